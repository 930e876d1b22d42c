"""Draw images of chosen classes from a DiT.

    python sample.py --ckpt assets/mnist.safetensors          # a small model of this repository; seconds on a CPU
    python sample.py --image-size 512 --seed 1
    python sample.py --ckpt results/000-DiT-XL-2 --labels "golden retriever" 417 --output dog.png
    python sample.py --sampler dpm-solver++ --num-sampling-steps 20 --interpolate classes --labels 207 360
    python sample.py --init-image photo.jpg --strength 0.6 --labels 88
    python sample.py --ckpt results/text --prompt "a robin" --prompt "a wren in the snow" --captions

With the same weights and seed these are the original release's images, on the CPU; for sets of images see sample_ddp.py."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
import sys

from runtime.parser import Parser
from sampling.config import SampleConfig, recorded_drawing

FEW_INVERSION_STEPS = 20  # with fewer, DDIM inversion and sampling are no inverses of each other, even approximately


def main(argv=None):
    with Parser(SampleConfig, __doc__, presets={"ckpt": recorded_drawing}).options(argv) as config:
        sample(config)


def sample(config):
    """Draw the images that the config describes, and write them to its files."""
    import torch  # here and below: it takes seconds to import, and mistakes on the command line are reported before

    from runtime.devices import explain_out_of_memory, precision_warning
    from runtime.errors import UserError
    from sampling import editing, grid
    from sampling.labels import choose
    from sampling.opened import Opened
    from sampling.pipeline import Pipeline

    # everything that can be wrong is checked before a model is built
    opened, edit, columns = Opened.open(config), config.editing, config.columns
    choices, size, steps = choose(config, opened), opened.settings["image_size"], opened.config.sampler.num_sampling_steps
    number = (len(choices) - (edit.interpolate == "classes")) * (columns if edit.interpolate else 1)
    grid.check_files(config, number, size, opened.frames)
    if opened.frames and (edit.init_image or edit.mask):
        raise UserError(f"--init-image {edit.init_image}", f"{opened.checkpoint.path} draws clips", "leave it out")
    image = edit.init_image and editing.read_image(edit.init_image, size, "--init-image")
    mask = edit.mask and editing.read_image(edit.mask, size, "--mask")
    if edit.invert and steps < FEW_INVERSION_STEPS:
        print(f"--invert: {steps} steps are few, and the image comes back inexactly; pass "
              f"--num-sampling-steps {FEW_INVERSION_STEPS} or more", file=sys.stderr)  # fmt: skip
    if warning := precision_warning(config.compute.precision, opened.device):
        print(warning, file=sys.stderr)

    advice = f"draw fewer images at once: lower --samples-per-label, or give fewer {opened.condition.option}"
    opened.check_memory(number, advice)
    with explain_out_of_memory(advice):
        # the original's random stream: the initial weights, which are then loaded, and what `draw_noise` draws
        torch.manual_seed(config.seed)
        pipeline, predictions = Pipeline.build(opened, draw_initial_weights=True), []
        start, titles = editing.draw_noise(pipeline, choices, edit, columns)
        if image is not None:
            start = editing.start_from(pipeline, start, edit, image, mask)
        for out in pipeline.steps(**start, progress=True):
            if config.save_trajectory:
                predictions.append(out["pred_xstart"].cpu())
        images = pipeline.to_pixels(out["sample"])
        grid.write_images(config.output, images, columns, config.enlarge, titles if config.captions else None)
        if config.save_trajectory:
            grid.write_trajectory(config.save_trajectory, pipeline.to_pixels, predictions, columns, config.enlarge)
    print(f"{len(images)} {'clips' if opened.frames else 'images'} in {config.output}")


if __name__ == "__main__":
    main()
