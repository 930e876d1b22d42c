"""diffusers' DiTPipeline for the original DiT. convert.py puts this file into a model's folder as pipeline.py.

pipeline = DiTPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipeline(pipeline.get_label_ids(["golden retriever"]), num_inference_steps=50).images
"""

import torch
from diffusers import DiTPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class OriginalDiTPipeline(DiTPipeline):
    """DiTPipeline with the timestep embedding that the weights were trained with, the model's own null class, the original
    release's guidance, and models of pixels, for which vae is None."""

    _optional_components = ["vae"]  # noqa: RUF012 -- diffusers wants a list

    def __init__(self, transformer, vae, scheduler, id2label=None):
        super().__init__(transformer, vae, scheduler, id2label)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0  # diffusers' DiT has 1: lower frequencies

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=4.0, generator=None, num_inference_steps=50, output_type="pil",
                 return_dict=True, latents=None, guided_channels=None):  # fmt: skip
        """As DiTPipeline's, and: latents, the noise to start from (N, C, H, W), drawn by default; guided_channels, how many
        channels are guided, by default 3 of 4 channels, as in the original release, and all of any other number.
        output_type: "pil", "np" (N, H, W, C) in [0, 1], "pt" (N, C, H, W) in [0, 1], or "latent", x_0 as it is."""
        config, device = self.transformer.config, self._execution_device
        channels, side = config.in_channels, config.sample_size
        guided = guided_channels or (3 if channels == 4 else channels)
        y = torch.as_tensor(class_labels, device=device).reshape(-1)
        y_both = torch.cat([y, torch.full_like(y, config.num_embeds_ada_norm)])  # the null class is the last row
        if latents is None:
            latents = randn_tensor((len(y), channels, side, side), generator, device, self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            x_in = self.scheduler.scale_model_input(x, t)
            if guidance_scale == 1:
                eps = self.transformer(x_in, t.expand(len(y)), y).sample[:, :channels]
            else:
                out = self.transformer(torch.cat([x_in, x_in]), t.expand(2 * len(y)), y_both).sample
                eps, uncond = out[:, :channels].chunk(2)
                guided_eps = uncond + guidance_scale * (eps - uncond)
                eps = torch.cat([guided_eps[:, :guided], eps[:, guided:]], dim=1)
            x = self.scheduler.step(eps, t, x).prev_sample
        images = x if output_type == "latent" else self._decode(x)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, x_0):
        if self.vae is not None:
            config = self.vae.config
            x_0 = self.vae.decode(x_0 / config.scaling_factor + (config.shift_factor or 0)).sample
        return (x_0 / 2 + 0.5).clamp(0, 1)
