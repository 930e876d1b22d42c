# An image with the environment of `make setup`, for CPUs and for NVIDIA GPUs.
#
#     docker build -t dit .
#     docker run --rm --ipc=host dit                                          runs the tests
#     docker run --rm --ipc=host --gpus all -v /data:/data -v "$PWD/results:/dit/results" dit \
#         torchrun --nproc_per_node=8 train.py --data-path /data/imagenet/train --run-dir results/xl2
#
# It was not built yet: see CONTRIBUTING.md, "What was run where".
FROM python:3.12-slim

# g++ is for torch.compile, Chromium for the test of the web page
RUN apt-get update && apt-get install --yes --no-install-recommends make g++ chromium && rm -rf /var/lib/apt/lists/*

WORKDIR /dit
COPY . .
RUN make setup
ENV PATH="/dit/.venv/bin:$PATH"
CMD ["make", "test"]
