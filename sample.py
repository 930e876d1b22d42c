"""Draw images of chosen classes from a DiT.

    python sample.py --image-size 512 --seed 1
    python sample.py --ckpt results/000-DiT-XL-2/checkpoints/0400000.pt --labels "golden retriever" 417 --output dog.png
    python sample.py --sampler dpm-solver++ --num-sampling-steps 20 --interpolate classes --labels 207 360
    python sample.py --init-image photo.jpg --strength 0.6 --labels 88
    python sample.py --ckpt results/text/checkpoints/0400000.pt --prompt "a robin" --prompt "a wren in the snow" --captions

With the same weights and seed these are the original release's images, on the CPU; for sets of images see sample_ddp.py.
"""

import sys

from runtime.parser import Parser
from sampling.config import SampleConfig

FEW_INVERSION_STEPS = 20  # with fewer, DDIM inversion and sampling are no inverses of each other, even approximately


def main(argv=None):
    parser = Parser(SampleConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        sample(config)


def sample(config):
    """Draw the images that the config describes, and write them to its files."""
    import torch  # here and below: it takes seconds to import, and mistakes on the command line are reported before

    from runtime.devices import explain_out_of_memory, pick_device, precision_warning
    from sampling import grid
    from sampling.editing import read_picture
    from sampling.original import choose_labels
    from sampling.pipeline import Pipeline
    from sampling.source import Source

    # everything that can be wrong is checked before a model is built
    editing, columns = config.editing, config.columns
    source = Source.open(
        config.source, config.sampler, config.guidance, config.compute, "mse", config.text, config.prompt or ()
    )
    labels, size = choose_labels(config, source), source.settings["image_size"]
    number = (len(labels) - (editing.interpolate == "classes")) * (columns if editing.interpolate else 1)
    side = size * config.enlarge
    grid.check_picture(config.output, "--output", number, side, columns, config.captions)
    if config.save_trajectory:
        grid.check_trajectory(config.save_trajectory, "--save-trajectory", number, side, columns)
    picture = editing.init_image and read_picture(editing.init_image, size, "--init-image")
    mask = editing.mask and read_picture(editing.mask, size, "--mask")
    if editing.invert and config.sampler.num_sampling_steps < FEW_INVERSION_STEPS:
        print(f"--invert: {config.sampler.num_sampling_steps} steps are few, and the image comes back inexactly; pass "
              f"--num-sampling-steps {FEW_INVERSION_STEPS} or more", file=sys.stderr)  # fmt: skip
    device = torch.device(pick_device(config.compute.device))
    if warning := precision_warning(config.compute.precision, device):
        print(warning, file=sys.stderr)

    advice = "draw fewer images at once: lower --samples-per-label, or give fewer --labels"
    source.check_memory(number, advice)
    with explain_out_of_memory(advice):
        # the original's random stream: the initial weights, which are then loaded, and what `draw` draws
        torch.manual_seed(config.seed)
        pipeline = Pipeline.build(source, device, draw_initial_weights=True)
        x_0, captions, predictions = draw(config, pipeline, labels, picture, mask)
        images = pipeline.to_pixels(x_0)
        grid.write_picture(config.output, grid.draw_grid(images, columns, config.enlarge, config.captions and captions))
        if config.save_trajectory:
            grid.write_trajectory(config.save_trajectory, pipeline.to_pixels, predictions, columns, config.enlarge)
    print(f"{len(images)} images in {config.output}")


def draw(config, pipeline, labels, picture=None, mask=None):
    """Draw an image of each label, or rows that interpolate, with the original's random stream.

    picture, mask: (1, 3, H, W) in [-1, 1], for image to image. Returns x_0, captions, and the predicted x_0 of every
    step if a trajectory is to be saved."""
    import torch

    from diffusion import samplers
    from diffusion.editing import ddim_inversion, inpainting_denoiser
    from diffusion.registry import SAMPLERS
    from sampling.original import draw_noise

    editing, device = config.editing, pipeline.device
    z, y, captions, step_noise = draw_noise(pipeline, labels, editing, config.columns)
    denoiser, start = pipeline.denoiser(y), {}
    if picture is not None:
        x_0 = pipeline.encode(picture).expand_as(z)
        if mask is not None:
            cells = torch.nn.functional.max_pool2d(mask[:, :1].to(device), pipeline.space.factor)
            known = (cells < 0).float()  # cells without any white
            denoiser = inpainting_denoiser(denoiser, pipeline.create_diffusion(""), x_0, known)
        elif editing.invert:
            process = samplers.respaced_process(
                SAMPLERS["ddim"], config.sampler.num_sampling_steps, pipeline.create_diffusion
            )
            z = samplers.last(ddim_inversion(process, denoiser, x_0, progress=True))
        else:
            start = {"init": x_0, "strength": editing.strength or 0.75}
    predictions = []
    for out in pipeline.steps(y, z, step_noise, progress=True, denoiser=denoiser, **start):
        if config.save_trajectory:
            predictions.append(out["pred_xstart"].cpu())
    return out["sample"], captions, predictions


if __name__ == "__main__":
    main()
