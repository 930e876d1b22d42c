"""The training step: encode, noise, loss, backward, optimizer, EMA."""

import contextlib
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from data.autoencoder import encode_batch
from data.condition import Classes
from diffusion.flow import shift_time
from diffusion.registry import make_objective
from runtime import seeds
from runtime.devices import set_precision, use_deterministic_kernels
from runtime.files import reason
from training.ema import EMA


@dataclass
class StepResult:
    """What one update leaves on this rank. losses: of the objective, by their names, (N,) each, `loss` among them;
    grad_norm, finite: scalars on the device (an update that is not finite was skipped)."""

    losses: dict
    grad_norm: torch.Tensor
    finite: torch.Tensor
    batch: dict


class Trainer:
    """The weights, their EMA and the optimizer, and the update of all three.

    recipe: RecipeConfig. compute: ComputeConfig, whose precision is fp32 where it names none. space: the latent space of
    batches. total_steps: of the run, for a cosine learning rate. condition: what the model draws by (default: its classes);
    both on the device. Parameters that require no gradient are not trained. steps_made, images_seen: where the run is."""

    def __init__(self, recipe, compute, context, model, space, total_steps=None, condition=None):
        self.recipe, self.compute, self.context, self.space = recipe, compute, context, space
        self.condition = condition or model.condition or Classes(model.num_classes)
        self.total_steps, precision = total_steps, compute.precision or "fp32"
        if compute.deterministic:
            use_deterministic_kernels()
        self.device = device = context.device
        self.model = model.train()
        model.y_embedder.eval()  # `step` drops conditions itself, for the whole batch
        model.gradient_checkpointing = compute.grad_checkpoint
        copied = None
        if compute.shard:
            from training import sharding  # which takes most of a second to import

            self.sharding, self.mesh = sharding, sharding.make_mesh(context, compute.shard)
            sharding.probe(context, self.mesh)
            sharding.shard(model, self.mesh, precision)
            copied = sharding.copy_of
        model.to(device)
        averages = recipe.ema_decays.items()
        self.emas = {name: EMA(model, decay, recipe.ema_warmup, copied and copied(model)) for name, decay in averages}
        self.ema = next(iter(self.emas.values()))
        guided = recipe.guidance_in_target, self.condition.null
        self.objective = make_objective(model.objective, model.predict, model.learn_sigma, *guided)
        # all parameters, frozen ones too: their places are part of the layout of the optimizer state in checkpoints
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        self.autocast = set_precision(precision, device)
        if compute.compile:
            # it would split blocks where DDP's gradient buckets end; a block's gradients are ready together anyway
            torch._dynamo.config.optimize_ddp = False
            for network in (model, *(ema.module for ema in self.emas.values())):
                network.compile_blocks(compute.compile)
        self.parallel_model = model
        if context.world_size > 1 and not compute.shard:
            self.parallel_model = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,  # the local device, not the global rank
                gradient_as_bucket_view=True,
                static_graph=compute.grad_accum == 1,  # it assumes one backward pass an update
            )
        self.steps_made = self.images_seen = 0
        # images that a process computes at once; what fits in training fits elsewhere
        self.part_size = max(1, recipe.global_batch_size // context.world_size // compute.grad_accum)

    def step(self, batch):
        """One update on this rank's part of the global batch, {"image" or "moments", "label", "index", ...}."""
        # noise, timesteps and null labels depend on (seed, step, rank): there is no random state to save or to lose
        seed = seeds.torch_seed(self.recipe.global_seed, seeds.TRAINING_STEP, self.steps_made, self.context.rank)
        torch.manual_seed(seed)
        y = self.condition.y(batch, self.device)
        x_0 = encode_batch(self.space, batch, self.device)  # (N, C, h, w)
        t = self.objective.draw_timesteps(len(x_0), self.device, self.recipe.timestep_sampling)
        if self.model.time_shift != 1:
            t = 1000 * shift_time(t / 1000, self.model.time_shift)
        noise = torch.randn_like(x_0)
        losses = self.backward(x_0, t, noise, self.condition.drop(y, self.model.config["class_dropout_prob"]))
        grad_norm, finite = self.optimizer_step()
        self.steps_made += 1
        self.images_seen += self.recipe.global_batch_size
        return StepResult(losses, grad_norm, finite, batch)

    def backward(self, x_0, t, noise, y):
        """Leave the gradient of the mean loss in the parameters. The batch is computed in --grad-accum parts; all that is
        random was drawn for the whole batch, so their number changes the result by rounding alone. Returns losses (N,)."""
        self.optimizer.zero_grad()
        num_parts, found = self.compute.grad_accum, []
        parts = zip(*(values.tensor_split(num_parts) for values in (x_0, t, noise, y)), strict=True)
        for i, (x_0_i, t_i, noise_i, y_i) in enumerate(parts, 1):
            # DDP exchanges the last sum, not the parts; with --shard no process has room for all of a sum
            synchronise = self.parallel_model is self.model or i == num_parts
            with contextlib.nullcontext() if synchronise else self.parallel_model.no_sync():
                with self.autocast:
                    losses = self.objective.training_losses(self.parallel_model, x_0_i, t_i, {"y": y_i}, noise_i)
                (losses["loss"].sum() / len(x_0)).backward()
            found.append({name: values.detach() for name, values in losses.items()})
        return {name: torch.cat([losses[name] for losses in found]) for name in found[0]}

    def optimizer_step(self):
        """Update weights and averages. Where the gradient is not finite, the fused optimizer leaves weights and state
        alone: on the device, without the host waiting, and on all ranks alike, since they share the averaged gradient. The
        averages move all the same, towards the weights as they are: to leave them would need the host, or a second pass.
        Returns the gradient's norm and whether it was finite."""
        weights = self.ema.weights
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        if self.compute.shard:
            grad_norm = grad_norm.full_tensor()
        if self.recipe.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(weights, self.recipe.clip_grad_norm, grad_norm)
        finite = grad_norm.isfinite()
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate(self.steps_made, self.total_steps)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        for ema in self.emas.values():
            ema.update(self.steps_made)
        return grad_norm, finite

    def averaged(self, name=None):
        """`full` of the average of this name in `emas`, the first one by default."""
        return self.full((self.emas[name] if name else self.ema).module)

    def full(self, module):
        """`module`, the model or an average's, with full (unsharded) weights: with --shard a copy, made by every rank."""
        if not self.compute.shard:
            return module
        module = self.sharding.copy_of(module, full=True)
        if self.compute.compile:
            module.compile_blocks(self.compute.compile)
        return module

    def state_dict(self):
        """The part of a checkpoint that updates change. With --shard every rank calls it; rank 0 gets host copies."""

        def stored(module):
            values = module.state_dict()
            return {name: values[name] for name in values if name in self.model.own} if self.model.own else values

        state = {"model": stored(self.model), "ema": stored(self.ema.module), "opt": self.optimizer.state_dict()}
        state |= {"step": self.steps_made, "images_seen": self.images_seen}
        if others := {name: stored(ema.module) for name, ema in self.emas.items() if ema is not self.ema}:
            state["emas"] = others
        return self.sharding.gather(state, self.context.is_main) if self.compute.shard else state

    def load_state_dict(self, state):
        """Restore such a state, but keep this run's hyperparameters. Raises ValueError where the state does not fit."""
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        own = self.model.own

        def restore(module, values):
            if own and values.keys() != own:
                raise ValueError(f"{min(values.keys() ^ own)} is in one of them")
            module.load_state_dict(values, strict=not own)  # the base's weights are there

        try:
            if self.compute.shard:
                state = self.sharding.scatter(state, self.model)
            restore(self.model, state["model"])
            found = {next(iter(self.emas)): state["ema"], **state.get("emas", {})}
            for name, ema in self.emas.items():  # an average that is new, with --allow-changes, starts at the weights
                restore(ema.module, found.get(name, state["model"]))
            pairs = zip(state["opt"]["param_groups"], hyperparameters, strict=True)
            self.optimizer.load_state_dict({**state["opt"], "param_groups": [{**theirs, **ours} for theirs, ours in pairs]})
            for p, saved in list(self.optimizer.state.items()):
                if not p.requires_grad:  # frozen since: its state would be of no use
                    del self.optimizer.state[p]
                elif any(saved[name].shape != p.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("moments of other shapes than the weights")
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{type(error).__name__}: {reason(error)}") from None
        self.steps_made, self.images_seen = state["step"], state["images_seen"]
