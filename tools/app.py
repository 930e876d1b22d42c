"""Draw images in the browser: a web page for one or more visitors.

    pip install "gradio>=6.24"
    python -m tools.app                                # assets/mnist.safetensors; the others below demo/ and results/
    python -m tools.app --ckpt results/xl2 --precision bf16 --port 8000

The page shows what sample.py draws for the same settings. Only this machine can open it, unless --host says otherwise."""

import runtime  # noqa: F401 -- first: from here on Ctrl-C prints a line  # isort: skip
import contextlib
import importlib.metadata
import os
import signal
import socket
import tempfile
from dataclasses import dataclass

from diffusion.registry import SAMPLERS
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import reason
from runtime.parser import Parser
from sampling.config import ComputeConfig

# Small images are enlarged without smoothing; the gallery has as many columns as fit; long lines end before icons, or wrap
CSS = """
.gradio-container {max-width: 1200px !important}
input[role=combobox] {text-overflow: ellipsis; margin-right: 24px}
#singles img {image-rendering: pixelated}
#singles .grid-container {grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)) !important}
#singles .fixed-height {min-height: 0 !important}
#singles:has(.preview) .gallery-container {min-height: 360px}
#singles .media-button img {width: 100%}
#command code {white-space: pre-wrap; overflow-wrap: anywhere}
"""


@dataclass(frozen=True)
class AppConfig(Config):
    """Options of app.py."""

    compute: ComputeConfig
    ckpt: str | None = option(None, "the checkpoint that is chosen first, or a run's folder, for its newest one (default: "
        "the small model in assets/)")  # fmt: skip
    vae: str | None = option(None, "autoencoder for all checkpoints (default: the one that a checkpoint records, or mse "
        'where that is "ema" or "mse" or nothing is recorded)')  # fmt: skip
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines open the page, without a password")
    port: int | None = option(None, "port to listen on (default: the first free one from 7860)", low=1, high=65535)


def main(argv=None):
    with Parser(AppConfig, __doc__).options(argv) as config:
        found = gradio_version()
        if found < (6, 24):
            what = f"6.24 or later, here is {'.'.join(map(str, found))}" if found else "which is not installed"
            raise UserError(f'the page needs the package gradio, {what}; install it with: pip install "gradio>=6.24"')
        serve(config)


def gradio_version():
    """(major, minor), or () where it is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version("gradio").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def serve(config):
    """Serve the page until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported: it asks no server for anything
    from sampling import web  # here and below: what takes seconds to import

    # mistakes end the command here, before what takes seconds
    web.offers(web.find_checkpoints(config.ckpt)[0], config.vae, config.compute)
    check_address(config)
    with tempfile.TemporaryDirectory(prefix="dit-app-") as folder:
        tempfile.tempdir = folder  # where Gradio copies pictures to, and nothing is left in the end
        import gradio as gr

        page = build_page(config)
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # Gradio's own come from the network
        theme = gr.themes.Default(**fonts).set(block_info_text_color="*neutral_500")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then too
        _, url, _ = page.queue(default_concurrency_limit=1).launch(
            server_name=config.host, server_port=config.port, share=False, quiet=True, prevent_thread_lock=True,
            theme=theme, css=CSS, footer_links=[], max_file_size="20mb", ssr_mode=False, run_history=False,
        )  # fmt: skip
        print(f"The page is at {url} (Ctrl-C stops it)", flush=True)
        page.block_thread()


def check_address(config):
    """Raises UserError where the page cannot be served at --host and --port, of which Gradio would try a hundred."""
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        where = f"--host {config.host} --port {config.port or ''}".rstrip()
        raise UserError(where, f"cannot be listened on ({reason(error).split(':')[0]})", "choose another") from None


def build_page(config):
    """The page as gradio.Blocks."""
    import gradio as gr

    from sampling import web

    artist, first, titles = web.Artist(), web.find_checkpoints(config.ckpt), web.TITLES
    choices, labels, (sampler, steps, scale), sizes = web.offers(first[0], config.vae)

    @contextlib.contextmanager
    def messages():
        """Show a UserError of the block to the visitor."""
        try:
            yield
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def conditions(choices, labels, prompt=""):
        """Updates of the fields for classes and prompts, one of which is shown."""
        return gr.update(choices=choices, value=labels, visible=bool(choices)), gr.update(value=prompt, visible=not choices)

    def shapes(sizes, size):
        """The values of the field for the size, which is shown where there are several."""
        return {"choices": sizes, "value": str(size) if len(sizes) > 1 else None, "visible": len(sizes) > 1}

    @messages()
    def offer_checkpoints():
        return gr.update(choices=web.find_checkpoints(config.ckpt))

    @messages()
    def offer(ckpt):
        """Updates of the fields that depend on the checkpoint."""
        choices, labels, settings, sizes = web.offers(ckpt, config.vae)
        return *conditions(choices, labels), *settings, gr.update(**shapes(sizes, sizes[0]))

    def draw(*values):
        """Yields updates: {component: value}."""
        with messages(), tempfile.TemporaryDirectory() as folder:
            settings = web.page_config(dict(zip(controls, values, strict=True)), config.compute, config.vae)
            no_archive = gr.update(value=None, interactive=False)
            yield {status: "Preparing the model", picture: None, singles: None, command: "", download: no_archive}
            for drawn_config, step, images, names in artist.draw(settings):
                if step:
                    steps = drawn_config.sampler.num_sampling_steps
                    text = f"Step {steps - step} of {steps}: the predicted images"
                    yield {status: text, picture: web.draw_grid(drawn_config, images, names)}
            path, gallery, archive = web.write_pictures(folder, drawn_config, images, names)
            text = f"The same from the command line:\n```\n{web.command(drawn_config)}\n```"
            yield {status: f"{len(images)} images", picture: path, singles: gallery, command: text,
                   download: gr.update(value=archive, interactive=True)}  # fmt: skip

    @messages()
    def restore(path):
        values = web.read_settings(path)
        if values["ckpt"] not in web.find_checkpoints(config.ckpt):
            raise UserError(f"Checkpoint: {values['ckpt']}, which drew this picture, is not there")
        known, *_, sizes = web.offers(values["ckpt"], config.vae)
        values["image_size"] = gr.update(**shapes(sizes, values["image_size"] or sizes[0]))
        values["labels"], values["prompt"] = conditions(known, values["labels"], values["prompt"])
        return [values[name] for name in controls]

    # Gradio removes its copies of pictures after a day; it looks every hour
    with gr.Blocks(title="Diffusion Transformers", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("## Diffusion Transformers")
        with gr.Row():
            with gr.Column(scale=2):
                controls = {
                    "ckpt": gr.Dropdown(first, value=first[0], label=titles["ckpt"]),
                    "labels": gr.Dropdown(choices, value=labels, multiselect=True, label=titles["labels"],
                        info="Type a number or a part of a name to search.", visible=bool(choices)),
                    "prompt": gr.Textbox("", lines=3, label=titles["prompt"], info="What to draw, one text in each line.",
                        visible=not choices, elem_id="prompt"),
                    "samples_per_label": gr.Slider(1, 32, 1, step=1, label=titles["samples_per_label"],
                        info="Of each class or prompt, or of a row from a class to the next."),
                    "interpolate": gr.Checkbox(False, label=titles["interpolate"],
                        info="Draw rows of images from each class to the next."),
                    "image_size": gr.Dropdown(**shapes(sizes, sizes[0]), label=titles["image_size"],
                        info="Height by width, in pixels."),
                    "sampler": gr.Dropdown([*SAMPLERS], value=sampler, label=titles["sampler"]),
                }  # fmt: skip
                with gr.Row():
                    for name, value in (("num_sampling_steps", steps), ("cfg_scale", scale), ("seed", 0)):
                        controls[name] = gr.Number(value, label=titles[name], min_width=80)
                with gr.Row():
                    start, stop = gr.Button("Draw", variant="primary", min_width=100), gr.Button("Stop", min_width=100)
            with gr.Column(scale=3):
                status = gr.Markdown("Choose what to draw, and press Draw.", elem_id="status")
                look = {"show_label": False, "buttons": ["download", "fullscreen"]}
                picture = gr.Image(label="Grid", format="png", interactive=False, elem_id="picture", **look)
                singles = gr.Gallery(label="Single images", elem_id="singles", object_fit="contain", height="auto", **look)
                command = gr.Markdown(elem_id="command")
                with gr.Row():
                    download = gr.DownloadButton("Download all", interactive=False)
                    load = gr.UploadButton("Settings from a picture", file_types=[".png"])
        page.load(offer_checkpoints, outputs=controls["ckpt"], show_progress="hidden")
        names = ("labels", "prompt", "sampler", "num_sampling_steps", "cfg_scale", "image_size")  # what `offer` returns
        controls["ckpt"].input(offer, controls["ckpt"], [controls[name] for name in names])
        shown = [status, picture, singles, command, download]
        start.click(None, outputs=status, js="() => 'Waiting until the model is free'")
        drawing = start.click(draw, [*controls.values()], shown, show_progress="hidden")
        drawing.failure(None, outputs=status, js="() => 'Nothing was drawn: the message says why'")
        stop.click(None, outputs=status, js="() => 'Stopped before the images were finished'", cancels=drawing)
        load.upload(restore, load, [*controls.values()])
    return page


if __name__ == "__main__":
    main()
