"""The cost model against published figures, counts by hand, and what must not be otherwise."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.cost.machines import GB, find_machine
from recall_jax.cost.model import plan_cost
from recall_jax.cost.work import MergeWork, flops_per_position, llama, parameters, recall_work
from recall_jax.engine.memory import block_bytes, largest_tensor_bytes, working_bytes
from recall_jax.errors import InputError
from recall_jax.parallel.mesh import parse_mesh

SEVEN = llama(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
SEVENTY = llama(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
LARGEST = llama(
    vocab_size=128256,
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
)
SLICES = {
    "v5e": ("v5e-8", "v5e-16", "v5e-32", "v5e-64", "v5e-128", "v5e-256"),
    "v5p": ("v5p-8", "v5p-16", "v5p-32", "v5p-64", "v5p-128"),
    "h200": ("h200-2", "h200-4", "h200-8", "h200-16", "h200-32"),
}


def total(arch):
    return sum(parameters(arch, unit) for unit in arch.units)


def test_parameters_are_as_published():
    # Llama 2 7B and 70B, Llama 3.1 405B, as their model cards and checkpoints count them
    assert total(SEVEN) == 6_738_415_616
    assert total(SEVENTY) == 68_976_648_192
    assert total(LARGEST) == 405_853_388_800


def test_operations_are_as_counted_by_hand():
    # q, k, v, o of 4096 x 4096; gate, up, down of 4096 x 11008; scores and their sum of 512 x 4096
    by_hand = 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 2 * 512 * 4096
    assert flops_per_position(SEVEN, "layers.0", 512) == by_hand
    assert flops_per_position(SEVEN, "layers.31", 512) == by_hand
    assert flops_per_position(SEVEN, "embed", 512) == flops_per_position(SEVEN, "head", 512) == 0
    # grouped queries: keys and values are an eighth
    by_hand = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 4 * 128 * 8192
    assert flops_per_position(SEVENTY, "layers.0", 128) == by_hand


def test_a_plan_is_as_counted_by_hand():
    work = recall_work(SEVEN, 3, typical=8, pool=64, tokens=512, batch_size=8)
    cost = plan_cost(work, find_machine("v5e-16"), mesh=parse_mesh("data=8,tensor=2"))
    model = 2 * 6_738_415_616
    kept = 12.5 * GB < 0.6 * 192 * GB  # by the host, which reads it once
    assert kept and cost.passes == 1
    assert cost.bytes_read == 3 * model
    assert cost.bytes_written == model
    each = 32 * flops_per_position(SEVEN, "layers.0", 512)
    assert cost.flops == {"select": 64 * 512 * each, "forward": 3 * 8 * 512 * each}
    # 4 hosts read it all but what chose: the embedding and the blocks of one model
    chosen = model - 2 * (32000 * 4096 + 4096)
    assert cost.select_s["read"] == pytest.approx(chosen / 4 / GB)
    assert cost.merge_s["read"] == pytest.approx((3 * model - chosen) / 4 / GB)
    # of 34 units a host has at most 8 blocks and the embedding, or the head, which is larger
    unit = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert cost.merge_s["write"] == pytest.approx((8 * unit + 2 * (32000 * 4096 + 4096)) / GB)
    # 8 devices split the rows, 2 the products, at 40 % of 197 TFLOP/s
    assert cost.merge_s["compute: forward"] == pytest.approx(3 * 512 * each / 2 / (0.4 * 197e12))
    # a piece is sent and sent back, 200 GB/s
    assert cost.merge_s["compute: pieces"] == pytest.approx(2 * model * 15 / 16 / 200e9)
    # parameters whole, and two sums of hidden states in a block, and in the head, over `tensor`
    passed = 3 * (chosen + 2 * 4096) * 15 / 16 + 3 * 33 * 4 * 512 * 4096 * 2 / 2
    assert cost.merge_s["compute: interconnect"] == pytest.approx(passed / 200e9)
    memory = cost.device_memory
    assert memory["rows of two units"] == 2 * 3 * unit / 16
    assert memory["parameters as computed"] == unit / 2
    assert memory["hidden states"] == max(3 * 512, 8 * 512) * 4096 * 2
    assert memory["activations"] == working_bytes(SEVEN, 8, 512, 1)
    assert memory["a tensor on its way"] == 2 * 32000 * 4096
    assert cost.seconds == pytest.approx(
        max(cost.select_s["read"], sum(cost.select_s.values()) - cost.select_s["read"])
        + cost.merge_s["read"]
    )


def test_what_fsdp_cuts_is_gathered_for_each_batch():
    work = recall_work(SEVEN, 2, typical=16, pool=16, batch_size=1)  # on each of 8 devices
    machine = find_machine("v5e-8")
    apart, cut = (plan_cost(work, machine, mesh=parse_mesh(m)) for m in ("data=8", "fsdp=8"))
    block = block_bytes(SEVEN, 2)
    more = 2 * 2 * 33 * block * 7 / 8 / 200e9  # of 2 models in 2 batches, 32 blocks and the head
    gap = cut.merge_s["compute: interconnect"] - apart.merge_s["compute: interconnect"]
    assert gap == pytest.approx(more)
    held = [cost.device_memory["parameters as computed"] for cost in (apart, cut)]
    assert held == [block, block / 8 + block]


def test_models_side_by_side_share_the_devices():
    work = recall_work(SEVEN, 4, typical=8, pool=8)
    machine = find_machine("v5p-32")
    turns, side = (
        plan_cost(work, machine, mesh=parse_mesh(m)) for m in ("data=8,tensor=2", "model=4,data=4")
    )
    assert side.flops == turns.flops
    ratio = side.merge_s["compute: forward"] / turns.merge_s["compute: forward"]
    assert ratio == pytest.approx(1)  # 16 devices either way
    with pytest.raises(InputError, match="model=16 does not divide 4 models"):
        plan_cost(work, machine, mesh=parse_mesh("model=16"))


def test_a_model_that_hosts_cannot_keep_is_read_again():
    work = recall_work(LARGEST, 2, pool=64)
    mesh = parse_mesh("tensor=8")
    once, again = (plan_cost(work, find_machine(m), mesh=mesh) for m in ("h200-8", "v6e-8"))
    assert once.bytes_read == work.bytes_read
    assert again.bytes_read == work.bytes_read + work.select_bytes
    assert 0.99 < work.select_bytes / (work.bytes_read / 2) < 1  # all but the head


def test_every_host_writes_its_own_units():
    work = recall_work(SEVEN, 2)
    machines = [find_machine(name) for name in ("v5p-8", "v5p-32", "v5p-128", "v5p-256")]
    write = [plan_cost(work, machine).merge_s["write"] for machine in machines]
    assert write[0] == pytest.approx(work.bytes_written / GB)
    assert write[1] < 0.3 * write[0]
    # 34 units of 16 and of 32 hosts: the second has the head too; all come off a device each
    assert write[2] == pytest.approx((2 * work.written[1] + work.written[-1]) / GB)
    assert write[3] == pytest.approx(work.bytes_written / 15 / GB)


def test_what_is_widened_on_cpu_is_not_counted_elsewhere():
    block = block_bytes(SEVEN, 2)
    for name, copies in ("v5e-1", 1), ("cpu-1", 3):
        memory = plan_cost(recall_work(SEVEN, 2), find_machine(name)).device_memory
        assert memory["parameters as computed"] == copies * block


def test_pooled_states_that_do_not_fit_take_more_passes():
    few, many = (
        plan_cost(recall_work(SEVENTY, 2, pool=pool), find_machine("v5e-16"))
        for pool in (1024, 16384)
    )
    assert few.passes == 1 < many.passes
    assert many.fits
    assert many.select_s["read"] == pytest.approx(many.passes * few.select_s["read"])
    assert many.flops["select"] == 16 * few.flops["select"]


def test_batches_are_halved_until_they_fit():
    machine = find_machine("v5e-16")
    asked, halved = (
        plan_cost(
            recall_work(SEVEN, 2, pool=20, typical=20, batch_size=size, tokens=tokens), machine
        )
        for size, tokens in ((1, 30_000), (2, 30_000))
    )
    assert asked.fits
    assert asked.device_memory == halved.device_memory


def test_without_a_forward_only_bytes_count():
    work = MergeWork([300, 600], [100, 200], inputs=3, models=2, forward=None)
    cost = plan_cost(work, find_machine("v6e-8"))
    assert (cost.bytes_read, cost.bytes_written) == (900, 300)
    assert cost.flops == {"select": 0, "forward": 0} and cost.select_s == {}
    assert set(cost.merge_s) == {"read", "compute: merge", "compute: pieces", "write"}
    whole = MergeWork(
        [300, 600], [100, 200], inputs=3, models=2, forward=None, largest_full_tensor=1000
    )
    more = plan_cost(whole, find_machine("v6e-8")).device_memory
    assert more["tensors taken whole"] >= 3 * 4 * 1000


@pytest.mark.parametrize("arch", [SEVEN, SEVENTY], ids=["7B", "70B"])
@pytest.mark.parametrize("family", SLICES)
def test_memory_falls_as_devices_are_added(arch, family):
    work = recall_work(arch, 4)
    costs = [plan_cost(work, find_machine(name)) for name in SLICES[family]]
    held = [sum(cost.device_memory.values()) for cost in costs]
    assert held == sorted(held, reverse=True)
    assert held[-1] < held[0]
    rows = [cost.device_memory["rows of two units"] * cost.machine.devices for cost in costs]
    assert rows == pytest.approx([rows[0]] * len(rows))
    reads = [cost.merge_s["read"] for cost in costs]
    assert reads == sorted(reads, reverse=True)


SMALL = llama(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
shapes = st.sampled_from([SMALL, SEVEN, SEVENTY])
machines = st.sampled_from([name for names in SLICES.values() for name in names])


@given(shapes, machines, st.sampled_from([1, 2, 4]), st.sampled_from([16, 100, 512]))
def test_more_work_costs_no_less(arch, name, models, tokens):
    machine = find_machine(name)
    work = {"typical": 12, "pool": 40, "tokens": tokens}
    cost = plan_cost(recall_work(arch, models, **work), machine)
    more = [
        plan_cost(recall_work(arch, 2 * models, **work), machine, mesh=cost.mesh),
        plan_cost(recall_work(arch, models, **work | {"tokens": 3 * tokens}), machine),
        plan_cost(recall_work(arch, models, **work | {"pool": 80}), machine),
        plan_cost(recall_work(arch, models, **work), machine, storage=GB / 2),
    ]
    for other in more:
        assert other.bytes_read >= cost.bytes_read
        assert other.seconds >= cost.seconds
        assert sum(other.flops.values()) >= sum(cost.flops.values())
        for part, size in cost.device_memory.items():
            assert other.device_memory[part] >= size
    assert math.prod(cost.mesh.values()) == machine.devices
    # what is held of parameters is at least a share of what is there
    assert (
        sum(cost.device_memory.values()) > models * largest_tensor_bytes(arch, 2) / machine.devices
    )


@pytest.mark.parametrize(
    "name, devices, hosts",
    [
        ("v5e-1", 1, 1),
        ("v5e-8", 8, 1),
        ("v5e-16", 16, 4),
        ("v5litepod-256", 256, 64),
        ("v5p-8", 4, 1),
        ("v5p-16", 8, 2),
        ("v5p-128", 64, 16),
        ("v6e-4", 4, 1),
        ("v6e-64", 64, 16),
        ("h200-1", 1, 1),
        ("h100-8", 8, 1),
        ("a100-32", 32, 4),
        ("cpu-4", 1, 1),
    ],
)
def test_machines_are_named_as_their_vendors_name_them(name, devices, hosts):
    machine = find_machine(name)
    assert (machine.name, machine.devices, machine.hosts) == (name, devices, hosts)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e-17", "v5e-0", "v5p-12", "v7-8", "h200-12", "cpu", "V5E-16", "v5e-16 "]
)
def test_other_machines_are_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        find_machine(name)
    line = str(error.value)
    assert repr(name) in line and "\n" not in line
    for family in ("v5e-N", "v5p-N", "v6e-N", "h200-N", "h100-N", "a100-N", "cpu-N"):
        assert family in line


def test_a_mesh_of_other_devices_is_refused():
    with pytest.raises(InputError, match="data=4,fsdp=1,tensor=1 has 4 devices and v5e-16 16"):
        plan_cost(recall_work(SEVEN, 2), find_machine("v5e-16"), mesh=parse_mesh("data=4"))
