"""What a program sends is waited for where no kernels run beside it."""

from __future__ import annotations

import pytest

from pi0_jax.flops import Device
from pi0_jax.plan import hlo
from pi0_jax.plan.hlo_collectives import collective, network_seconds
from pi0_jax.plan.timeline import timeline

# A product is 2 ms and 0.2 MB; a sum 3 ms and 3 MB; what is gathered 4 ms and 1 MB of which 3 / 4 are sent.
CARD = Device(1e9, flops=2 * 100 * 100 * 50 / 2e-3, bandwidth=1e9, link=0.75e6 / 4e-3, node=2, network=0.75e6 / 4e-3)
GATHER = "channel_id={0}, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
TEXT = f"""
%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %x = f32[250000]{{0}} parameter(0)
  %early = (f32[62500]{{0}}, f32[250000]{{0}}) all-gather-start(%piece), {GATHER.format(1)}
  %product = bf16[100,100]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %a = bf16[100,50]{{1,0}} parameter(1)
  %got = f32[250000]{{0}} all-gather-done(%early)
  %late = (f32[62500]{{0}}, f32[250000]{{0}}) all-gather-start(%piece), {GATHER.format(2)}
  %sum = f32[250000]{{0}} add(%x, %x)
  %got_late = f32[250000]{{0}} all-gather-done(%late)
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %w = (s32[], f32[4]) while(%tuple), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"10"}}}}
}}
"""


def test_collectives_run_beside_kernels_until_they_are_waited_for():
    played = timeline(hlo.parse(TEXT), CARD)
    assert played.kernels == pytest.approx(10 * (2e-3 + 3e-3), rel=1e-6)
    assert played.products == pytest.approx(10 * 2e-3)
    assert played.network == pytest.approx(10 * 8e-3) == network_seconds(hlo.parse(TEXT), CARD)
    assert played.waited == pytest.approx(10 * (4 - 2 + 4 - 3) * 1e-3)
    assert played.sent == 10 * 2 * 0.75e6
    assert played.beside == 10 * 0.75e6


def test_one_that_is_not_started_apart_is_waited_for_and_keeps_those_after_it():
    text = TEXT.replace("%late = (f32[62500]{0}, f32[250000]{0}) all-gather-start", "%late = f32[250000]{0} all-gather")
    assert timeline(hlo.parse(text), CARD).waited == pytest.approx(10 * (4 - 2 + 4) * 1e-3)


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("replica_groups={{1,3},{5,7}}", (1, 3)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("source_target_pairs={{0,5},{5,0}}", (0, 5)),
    ],
)
def test_the_devices_of_a_group(groups, group):
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} all-reduce(%x), {groups}\n}}"
    (it,) = hlo.parse(text).computations["main"].values()
    found = collective(it)
    assert found is not None
    assert found.group == group


def test_devices_in_an_unknown_notation_are_an_error():
    text = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %a = f32[8]{0} all-reduce(%x), replica_groups=other[2]\n}"
    (it,) = hlo.parse(text).computations["main"].values()
    with pytest.raises(ValueError, match=r"not known: .*other"):
        collective(it)


@pytest.mark.parametrize(
    ("groups", "rate"),
    [("{{0,1,2,3}}", 450e9), ("{{0,8}}", 50e9), ("{{0,1,8,9}}", 100e9), ("[1,64]<=[64]", 400e9)],
)
def test_rings_over_nodes_leave_each_by_as_many_adapters_as_it_has_devices_of_them(groups, rate):
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %a = f32[1000]{{0}} all-gather(%x), replica_groups={groups}\n}}"
    (it,) = hlo.parse(text).computations["main"].values()
    found = collective(it)
    assert found is not None
    assert found.seconds(Device(1e9, 1e12, 1e12, 450e9, 8, 50e9)) == pytest.approx(found.sent / rate)
