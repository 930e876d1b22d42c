"""Which timesteps of a long process a short one keeps, and the schedule that results."""

import numpy as np


def space_timesteps(num_timesteps, section_counts):
    """Choose timesteps of a process of `num_timesteps`.

    section_counts: "ddimN" keeps every k-th timestep from 0, where k is the integer that leaves exactly N; "a,b,c" (or a
    list, or one number) splits the process into equal sections, the first ones taking the remainder, and keeps a, b, c
    of each, evenly from its first to its last, where 0 keeps none of a section; "" keeps all. Returns the kept timesteps,
    ascending. Raises ValueError when there is no such choice."""
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _strided(num_timesteps, section_counts)
        try:
            section_counts = [int(count) for count in section_counts.split(",")] if section_counts else [num_timesteps]
        except ValueError:
            raise ValueError(f'timestep spacing "{section_counts}" is not "N", "a,b,c" or "ddimN"') from None
    counts = [section_counts] if isinstance(section_counts, int) else list(section_counts)
    size, remainder = divmod(num_timesteps, max(1, len(counts)))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < remainder)
        if not 0 <= count <= length:
            raise ValueError(f"cannot keep {count} of a section of {length} timesteps: ask for 0 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # summed, not multiplied: rounding to even then falls as in the published schedules
            kept.append(start + round(position))
            position += stride
        start += length
    if not kept:
        raise ValueError(f"a spacing must keep at least one of the {num_timesteps} timesteps")
    return kept


def _strided(num_timesteps, spacing):
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if f"ddim{len(kept)}" == spacing:
            return list(kept)
    raise ValueError(f'"{spacing}": no integer stride keeps exactly this number of {num_timesteps} timesteps')


def respaced_betas(betas, timesteps):
    """The betas of the process that visits only `timesteps` of the process with `betas`: its alpha_bar at the kept steps
    are the long process's (Nichol and Dhariwal 2021, eq. 19). float64 in and out."""
    alpha_bar = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[list(timesteps)]
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
