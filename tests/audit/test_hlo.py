"""HLO text, read: against numbers that were counted by hand."""

from __future__ import annotations

from nxdt_nemo.audit.hlo import Graph

TEXT = """\
HloModule IrToHlo.40, entry_computation_layout={(f32[8,4]{1,0})->(f32[8,6]{1,0})}

%AddComputation.5 (x.6: f32[], y.7: f32[]) -> f32[] {
  %x.6 = f32[] parameter(0)
  %y.7 = f32[] parameter(1)
  ROOT %add.8 = f32[] add(f32[] %x.6, f32[] %y.7)
}

ENTRY %IrToHlo.40 (p0.1: f32[8,4], p1.2: f32[4,6], p2.3: bf16[2,8,4]) -> (f32[8,6]) {
  %p0.1 = f32[8,4]{1,0} parameter(0), frontend_attributes={neff_input_names="input0"}
  %p1.2 = f32[4,6]{1,0} parameter(1)
  %p2.3 = bf16[2,8,4]{2,1,0} parameter(2)
  %transpose.1 = f32[6,4]{0,1} transpose(f32[4,6]{1,0} %p1.2), dimensions={1,0}
  %dot.9 = f32[8,6]{1,0} dot(f32[8,4]{1,0} %p0.1, f32[6,4]{0,1} %transpose.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %dot.10 = bf16[2,8,8]{2,1,0} dot(bf16[2,8,4]{2,1,0} %p2.3, bf16[2,8,4]{2,1,0} %p2.3), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  %constant.11 = f32[] constant(0)
  %tuple.12 = (f32[8,6]{1,0}, f32[]) tuple(f32[8,6]{1,0} %dot.9, f32[] %constant.11)
  %get-tuple-element.13 = f32[8,6]{1,0} get-tuple-element((f32[8,6]{1,0}, f32[]) %tuple.12), index=0
  %get-tuple-element.14 = f32[] get-tuple-element((f32[8,6]{1,0}, f32[]) %tuple.12), index=1
  %all-reduce.15 = (f32[8,6]{1,0}, f32[]) all-reduce(f32[8,6]{1,0} %get-tuple-element.13, f32[] %get-tuple-element.14), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%AddComputation.5
  %get-tuple-element.16 = f32[8,6]{1,0} get-tuple-element((f32[8,6]{1,0}, f32[]) %all-reduce.15), index=0
  %all-gather.17 = f32[16,6]{1,0} all-gather(f32[8,6]{1,0} %get-tuple-element.16), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %reduce-scatter.18 = f32[8,6]{1,0} reduce-scatter(f32[16,6]{1,0} %all-gather.17), replica_groups={{0,4}}, dimensions={0}, to_apply=%AddComputation.5
  %collective-permute.19 = f32[8,6]{1,0} collective-permute(f32[8,6]{1,0} %reduce-scatter.18), source_target_pairs={{0,1},{1,0}}
  ROOT %tuple.20 = (f32[8,6]{1,0}) tuple(f32[8,6]{1,0} %collective-permute.19)
}
"""  # noqa: E501


ATTENTION = """\
ENTRY %IrToHlo.20 (p0.1: bf16[2,8,4], p1.2: bf16[2,8,4], p2.3: bf16[2,8,4], p3.4: bf16[8,6]) -> (bf16[8,6]) {
  %p0.1 = bf16[2,8,4]{2,1,0} parameter(0)
  %p1.2 = bf16[2,8,4]{2,1,0} parameter(1)
  %v = bf16[2,8,4]{2,1,0} parameter(2)
  %q = bf16[2,8,4]{2,1,0} multiply(%p0.1, %p1.2)
  %k = bf16[2,8,4]{2,1,0} add(%p0.1, %p1.2)
  %w = bf16[8,6]{1,0} parameter(3)
  %dot.1 = bf16[2,8,8]{2,1,0} dot(%q, %k), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  %convert.1 = f32[2,8,8]{2,1,0} convert(%dot.1)
  %exponential.1 = f32[2,8,8]{2,1,0} exponential(%convert.1)
  %dot.2 = f32[2,8,4]{2,1,0} dot(%exponential.1, %v), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
  %transpose.1 = f32[8,2,4]{2,0,1} transpose(%dot.2), dimensions={1,0,2}
  %reshape.1 = f32[8,8]{1,0} reshape(%transpose.1)
  ROOT %dot.3 = f32[8,6]{1,0} dot(%reshape.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501


def test_of_batched_products_that_can_be_one_kernel_only_weights_are_moved() -> None:
    given, projected = 2 * 8 * 4 * 2, (8 * 8 + 8 * 6) * 4 + 8 * 6 * 2
    assert Graph(ATTENTION).product_bytes == given + projected
    apart = ATTENTION.replace("exponential(%convert.1)", "broadcast(%c)").replace(
        "%k =", "%c = f32[] constant(1)\n  %k ="
    )
    alone = (3 * 2 * 8 * 4 + 2 * 8 * 8) * 2 + (2 * 8 * 8 + 2 * 8 * 4) * 4
    assert Graph(apart).product_bytes == alone + projected


def test_products_count_two_for_a_multiply_add() -> None:
    assert Graph(TEXT).flops == 2 * 8 * 6 * 4 + 2 * (2 * 8 * 8) * 4


def test_products_read_each_operand_once() -> None:
    in_float32, in_bfloat16 = (8 * 4 + 6 * 4 + 8 * 6) * 4, (2 * 8 * 4 * 2 + 2 * 8 * 8) * 2
    assert Graph(TEXT).product_bytes == in_float32 + in_bfloat16


def test_collectives_have_their_groups_and_the_bytes_that_a_rank_receives_at_least() -> None:
    reduce, gather, scatter, permute = Graph(TEXT).collectives
    assert reduce.groups == ((0, 1, 2, 3), (4, 5, 6, 7)) and reduce.whole == 8 * 6 * 4
    assert reduce.received == 2 * 8 * 6 * 4 * 3 // 4
    assert gather.groups == ((0, 4), (1, 5), (2, 6), (3, 7)) and gather.whole == 16 * 6 * 4
    assert gather.received == 16 * 6 * 4 // 2
    assert scatter.group_of(4) == (0, 4) and scatter.group_of(1) == () and scatter.received == 16 * 6 * 4 // 2
    assert permute.groups == ((0, 1), (1, 0)) and permute.received == 8 * 6 * 4
    assert [one.how for one in Graph(TEXT).collectives] == ["add", "dim 0", "add dim 0", ""]
    assert Graph(TEXT.replace("%add.8 = f32[] add(", "%max.8 = f32[] maximum(")).collectives[0].how == "maximum"


def test_parameters_are_the_entrys_own() -> None:
    assert [shape.dims for shape in Graph(TEXT).parameters()] == [(8, 4), (4, 6), (2, 8, 4)]


def test_ranks_that_run_one_program_have_one_digest() -> None:
    assert Graph(TEXT).digest == Graph(TEXT.replace("IrToHlo.40", "IrToHlo.41")).digest
    assert Graph(TEXT).digest != Graph(TEXT.replace("{{0,4}}", "{{0,5}}")).digest
