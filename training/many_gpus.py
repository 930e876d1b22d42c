"""What a training step on many GPUs costs: memory of each GPU, bytes that it exchanges with the others, and an estimate of
the time.

DDP keeps a whole copy on each GPU and averages the float32 gradients. Sharding (training/sharding.py) divides weights,
gradients, optimizer state and EMA among the GPUs, or among those of each node. The weights of a block are gathered before
its forward pass and again before its backward pass, and its gradients are then averaged while they are divided again.

    step = Step(build("DiT-XL/2"), batch_size=32, precision="bf16", shard="all")
    step.estimate(Network(gpus_per_node=8, in_node=360e9, between_nodes=40e9, latency=5e-6), gpus=64, flops_per_second=4e14)
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

from training.cost import forward_macs, trainable, training_memory

BUCKET = 25 * 2**20  # bytes of gradients that DDP exchanges at once, its default


@dataclass(frozen=True)
class Network:
    """Connections of a cluster. Bandwidths are those of a GPU in one direction, in bytes per second: in_node to the other
    GPUs of its node, between_nodes of its own network adapter. latency: seconds of a hop from node to node."""

    gpus_per_node: int
    in_node: float
    between_nodes: float
    latency: float

    def nodes(self, gpus):
        return math.ceil(gpus / self.gpus_per_node)

    def ring_seconds(self, nbytes, gpus, passes, collectives=1):
        """Seconds in which each of the GPUs sends `passes` times (gpus - 1) / gpus of `nbytes` around rings: one pass is an
        all-gather or a reduce-scatter, two are an all-reduce. Each GPU of a node has a ring of its own, which carries its
        part of the bytes and leaves the node by its adapter, so that the slower of the two connections counts. A pass has
        to make a hop to every node; an all-reduce is made by trees instead where that takes fewer hops."""
        nodes, sent = self.nodes(gpus), passes * (gpus - 1) / gpus * nbytes
        bandwidth = self.in_node if nodes == 1 else min(self.in_node, self.between_nodes * min(gpus, self.gpus_per_node))
        hops = passes * (nodes - 1)
        if passes == 2 and nodes > 1:
            hops = min(hops, 2 * math.ceil(math.log2(nodes)))
        return sent / bandwidth + collectives * hops * self.latency


@dataclass(frozen=True)
class Step:
    """A training step. model: on the meta device. batch_size: of each GPU. shard: "all", "node", or None for DDP."""

    model: object
    batch_size: int
    precision: str
    shard: str | None = None

    @cached_property
    def flops(self):
        """Of each GPU: two for a multiply-accumulate, and a backward pass of twice the forward pass."""
        return 6 * forward_macs(self.model) * self.batch_size

    @cached_property
    def memory_alone(self):
        return training_memory(self.model, self.batch_size, self.precision)

    @cached_property
    def weight_bytes(self):
        """(of a gathered block, of all gathered blocks, of the weights outside of blocks, which stay float32)"""
        block = sum(p.numel() for p in self.model.blocks[0].parameters())
        blocks, everything = len(self.model.blocks) * block, sum(p.numel() for p in self.model.parameters())
        width = 2 if self.precision == "bf16" else 4
        return width * block, width * blocks, 4 * (everything - blocks)

    def autocast_copies(self):
        """Bytes of the bf16 copies of the blocks' weights that autocast makes in the forward pass, and autograd keeps."""
        from torch import nn  # takes seconds: complexity.py imports this module to read its command line

        layers = (m for block in self.model.blocks for m in block.modules() if isinstance(m, nn.Linear))
        return 2 * sum(layer.weight.numel() for layer in layers) if self.precision == "bf16" else 0

    def memory(self, num_shards):
        """Bytes on each GPU by what holds them: `training.cost.training_memory`, divided among `num_shards` GPUs. Gathered
        are the block at work and the next one, whose gathering overlaps with it, the weights outside of blocks, and the
        whole gradient of one block in float32."""
        parts = dict(self.memory_alone)
        if not self.shard or num_shards == 1:
            return parts
        for name in ("weights", "ema", "gradients", "optimizer"):
            parts[name] = math.ceil(parts[name] / num_shards)
        parts["activations"] -= self.autocast_copies()  # the gathered weights are bf16 themselves, and are freed
        block, _, rest = self.weight_bytes
        gradient = 4 * sum(p.numel() for p in self.model.blocks[0].parameters())
        parts["gathered weights and gradients"] = 2 * block + rest + gradient
        del parts["total"]
        return parts | {"total": sum(parts.values())}

    def num_shards(self, gpus, gpus_per_node):
        return {None: 1, "all": gpus, "node": min(gpus, gpus_per_node)}[self.shard]

    def exchanged(self, gpus, gpus_per_node):
        """Bytes that each GPU sends in a step, by collective operation. Gradients are float32."""
        shards, gradients = self.num_shards(gpus, gpus_per_node), 4 * trainable(self.model)
        (_, blocks, rest), sent, copies = self.weight_bytes, {}, gpus / shards
        if self.shard:
            others = (shards - 1) / shards
            sent["all-gather of weights, forward"] = others * (blocks + rest)
            sent["all-gather of weights, backward"] = others * blocks
            sent["reduce-scatter of gradients"] = others * gradients
        if self.shard != "all":
            sent["all-reduce of gradients"] = 2 * (copies - 1) / copies * gradients / shards
        return sent

    def estimate(self, network, gpus, flops_per_second):
        """Memory, exchange and time of a step on this many GPUs, a dict. flops_per_second: that each GPU reaches.

        The forward pass takes a third of the computing. What is exchanged for a pass overlaps with its computing, but for
        the first gathering and the last reduction, which have nothing to overlap with. With shard="node" the connections in
        the nodes and between them work at the same time."""
        computing, gradients = self.flops / flops_per_second, 4 * trainable(self.model)
        shards, (_, blocks, rest) = self.num_shards(gpus, network.gpus_per_node), self.weight_bytes
        between = 0.0
        if self.shard:
            parts = len(self.model.blocks) + 1  # one for each block, and one for what is outside of them
            forward = network.ring_seconds(blocks + rest, shards, 1, parts)
            backward = network.ring_seconds(blocks, shards, 1, parts - 1)
            reduce = network.ring_seconds(gradients, shards, 1, parts)
            if self.shard == "node":  # each GPU with those that have the same part, one in each node
                alone = dataclasses.replace(network, gpus_per_node=1)
                between = alone.ring_seconds(gradients / shards, gpus // shards, 2, parts)
        else:
            parts, forward, backward = math.ceil(gradients / BUCKET), 0.0, 0.0
            reduce = network.ring_seconds(gradients, gpus, 2, parts)
        seconds = max(computing / 3, forward) + max(computing * 2 / 3, backward + reduce, between)
        seconds += (forward + reduce + between) / parts
        return {
            "gpus": gpus,
            "memory_bytes": self.memory(shards),
            "exchanged_bytes": self.exchanged(gpus, network.gpus_per_node),
            "computing_seconds": computing,
            "step_seconds": seconds,
            "images_per_second": gpus * self.batch_size / seconds,
            "scaling": computing / seconds,
        }
