"""The arithmetic of a step on many ranks: its parts, what hides behind what, and which part decides. Without torch.

An all-reduce takes its latency, and the time in which 2 (n - 1) / n of its bytes pass a link: the bus bandwidth of
nccl-tests (doc/PERFORMANCE.md). DistributedDataParallel sends gradients in buckets while the backward pass still runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# torch.nn.parallel.DistributedDataParallel's bucket_cap_mb, and the smaller first bucket of its reducer.
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20
FEW_IMAGES = 32  # images per rank from which on norms of one rank's images cost no accuracy (docs/cluster.md)


@dataclass(frozen=True)
class Link:
    """A way between ranks.

    Attributes:
        latency: seconds of an all-reduce of a few bytes.
        bandwidth: bytes per second: the bus bandwidth of nccl-tests.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """Nodes with some ranks each.

    Attributes:
        per_node: ranks of a node.
        inside: between the ranks of a node.
        between: between nodes, for all ranks of a node together.
    """

    per_node: int
    inside: Link
    between: Link

    def all_reduce(self, size: float, ranks: int) -> float:
        """Return the seconds in which ranks sum a tensor of `size` bytes; all nodes are full, or there is one.

        The slowest link decides. Between nodes, latency grows with the depth of a tree, as that of NCCL's.
        """
        if ranks == 1:
            return 0.0
        volume = 2 * (ranks - 1) / ranks * size
        if ranks <= self.per_node:
            return self.inside.latency + volume / self.inside.bandwidth
        depth = math.log2(ranks / self.per_node)
        bandwidth = min(self.inside.bandwidth, self.between.bandwidth)
        return self.inside.latency + self.between.latency * depth + volume / bandwidth


@dataclass(frozen=True)
class Stage:
    """A part of a network, in the order of the forward pass.

    Attributes:
        sizes: bytes of its parameters' gradients, in the order of the network.
        work: its share of the backward pass, in any unit.
    """

    sizes: Sequence[int]
    work: float


@dataclass(frozen=True)
class Bucket:
    """Gradients that are summed together.

    Attributes:
        size: in bytes.
        ready: the share of the backward pass after which all of them are there.
    """

    size: int
    ready: float


def fill_buckets(stages: Sequence[Stage]) -> list[Bucket]:
    """Return the buckets in which DistributedDataParallel sends gradients; the network's last gradient comes first.

    A bucket is complete with the gradient with which it reaches its capacity. Within a stage, the work up to a gradient
    is in proportion to the bytes up to it.
    """
    total = sum(stage.work for stage in stages)
    buckets: list[Bucket] = []
    filled, done, ready = 0, 0.0, 0.0
    for stage in reversed(stages):
        passed = 0
        for size in reversed(stage.sizes):
            passed, filled = passed + size, filled + size
            ready = (done + stage.work * passed / sum(stage.sizes)) / total
            if filled >= (BUCKET if buckets else FIRST_BUCKET):
                buckets.append(Bucket(filled, ready))
                filled = 0
        done += stage.work
    return [*buckets, Bucket(filled, ready)] if filled else buckets


def find_exposed(
    buckets: Sequence[Bucket], backward: float, all_reduce: Callable[[float], float], share: float = 0.0
) -> float:
    """Return the seconds by which summing the gradients makes the backward pass and what follows it longer.

    Args:
        buckets: in the order in which they are sent, one after another.
        backward: seconds of the backward pass.
        all_reduce: returns the seconds of a bucket of some bytes.
        share: of an all-reduce, which the cores of the backward pass do: it stands still meanwhile.
    """
    end = delay = 0.0
    for bucket in buckets:
        seconds = all_reduce(bucket.size)
        end = max(end, bucket.ready * backward + delay) + seconds
        delay += share * seconds if bucket.ready < 1 else 0.0
    return max(end - backward, delay, 0.0)


@dataclass(frozen=True)
class Work:
    """What a rank does in a step, in seconds, without the other ranks.

    Attributes:
        forward: of one pass.
        backward: of one pass.
        optimiser: of a step.
        load: in which its loader makes the images of one pass.
        passes: of a step; gradients are sent in the last.
    """

    forward: float
    backward: float
    optimiser: float
    load: float
    passes: int = 1


@dataclass(frozen=True)
class Step:
    """A predicted step, in seconds.

    Attributes:
        compute: passes and optimiser.
        all_reduce: of all gradients.
        exposed: what the all-reduces add to the step.
        load: of all images of a rank.
        seconds: of the step.
        bound: what decides: "compute", "network" or "loader".
    """

    compute: float
    all_reduce: float
    exposed: float
    load: float
    seconds: float
    bound: str


def predict_step(
    work: Work, buckets: Sequence[Bucket], cluster: Cluster, ranks: int, cpu_share: float | None = None
) -> Step:
    """Return the step of some ranks.

    Args:
        work: of each rank.
        buckets: of the network.
        cluster: on which the ranks run.
        ranks: their number.
        cpu_share: None on a GPU: the loader works beside the passes. On a CPU, where it takes its time from their
            cores: the share of an all-reduce that these cores do, 1 if they copy all the time, 0 if they wait.
    """

    def sum_bucket(size: float) -> float:
        return cluster.all_reduce(size, ranks)

    compute = work.passes * (work.forward + work.backward) + work.optimiser
    total = sum(sum_bucket(bucket.size) for bucket in buckets)
    exposed = find_exposed(buckets, work.backward, sum_bucket, cpu_share or 0.0)
    busy, load = compute + exposed, work.passes * work.load
    largest = "network" if exposed > compute else "compute"
    if cpu_share is None:
        return Step(compute, total, exposed, load, max(busy, load), "loader" if load > busy else largest)
    return Step(compute, total, exposed, load, busy + load, "loader" if load > max(compute, exposed) else largest)


def find_needed_bandwidth(
    work: Work, buckets: Sequence[Bucket], cluster: Cluster, ranks: int, waits: float = 0.05
) -> float:
    """Return the bandwidth between nodes, in bytes per second, with which ranks wait for gradients for that share.

    Args:
        work: of each rank.
        buckets: of the network.
        cluster: on which the ranks run, several nodes of it; only its latencies count.
        ranks: their number.
        waits: seconds waited over seconds computed. Latency alone may cost more: then the result is infinite.
    """
    low, high = 1e6, 1e15
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        links = (Link(link.latency, middle) for link in (cluster.inside, cluster.between))
        step = predict_step(work, buckets, Cluster(cluster.per_node, *links), ranks)
        low, high = (low, middle) if step.exposed <= waits * step.compute else (middle, high)
    return high if high < 1e14 else math.inf


def split_batch(global_batch: int, ranks: int, most: int) -> tuple[int, int]:
    """Return the images of a pass and the passes of a step on each rank; (0, 0) if the batch cannot be dealt evenly.

    Args:
        global_batch: images of a step over all ranks.
        ranks: their number.
        most: images that a rank takes in one pass.
    """
    if global_batch % ranks:
        return 0, 0
    images = global_batch // ranks
    passes = next(count for count in range(1, images + 1) if images % count == 0 and images // count <= most)
    return images // passes, passes
