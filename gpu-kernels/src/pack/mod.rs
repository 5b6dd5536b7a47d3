//! **pack**: QK-norm, RoPE and reordering in one pass over Q, K and V.
//!
//! Each warp has one row: the heads of a token, of Q, K or V. First it starts copies of the whole
//! row to shared memory ([`row`]). That is enough in flight to hide the latency of memory, and lets
//! a norm over all heads see the row before it is written. Then the part of each head is normed
//! ([`norm`]), rotated ([`rope`]) and, in Q, scaled. In 8 bits, the transform follows
//! ([`hadamard`]). It goes into the [image](framestride_shapes::image) of the head, to the row that
//! the head's layout wants.
//!
//! A lane reads only what it has copied itself, so warps never wait for each other.
//!
//! Profiling reads all of K and V, and few rows of Q. So what is packed before it
//! ([`PackPass::BeforeProfiling`]) has no other rows of Q, and may have half of the keys at a time.
//!
//! Grid: x = packed_rows / warps of a block, y = 3 (in 8 bits 2), z = batch. Before profiling y =
//! 2, and x is larger, so that there are blocks for a warp for each sample.

pub mod e4m3;
mod hadamard;
mod norm;
mod rope;
mod row;

use crate::cuda::{global, shared, thread, warp};
use crate::element::{self, Element};
use crate::model::{Model, sampled_video_row, valid_text};
use framestride_shapes::dtype::Compute;
use framestride_shapes::image::{CHUNK_BYTES, e4m3 as e4m3_image};
use framestride_shapes::layout::HeadType;
use framestride_shapes::numbers::Numbers;
use framestride_shapes::params::{NormWeights, PackParams, PackPass};
use norm::{Affine, Statistic, head_statistic, token_statistic};
use rope::{Rotation, Tables};
use row::{Head, Heads, Held, chunk, head_of, heads_at_once};

/// The kernel's body.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, and `params` is as its
/// documentation says.
#[inline(always)]
pub unsafe fn pack<M: Model>(params: &PackParams) {
    let in_8_bits = const { matches!(M::COMPUTE, Compute::E4m3) };
    let before_profiling = !in_8_bits && params.pass == PackPass::BeforeProfiling as u32;
    // Rows that read the same tables of RoPE are worked on near each other. Blocks start in the
    // order of x, y, z. Three in a row take some tokens of one item, one for each warp. The next
    // three take the same tokens of the next item, whose tables L2 still has. Of the three, two
    // have Q and K of half of the tokens, whose tables L1 has, and one has V. Before profiling, two
    // in a row have K and V of the same tokens.
    let parts = if in_8_bits || before_profiling { 2 } else { 3 };
    let block = thread::block_x() + thread::blocks_x() * (thread::block_y() + parts * thread::block_z());
    if block == 0 && thread::index() == 0 {
        global::store_u32(params.schedule, 0);
        global::store_u32(params.schedule + 4, 0);
    }
    let Numbers { before_tokens, rope_before, rope_after, .. } = M::numbers();
    // A division by what might be zero would come with a branch to a trap.
    core::hint::assert_unchecked(params.batch != 0 && params.heads != 0);
    let (part, item, group) = (block % parts, block / parts % params.batch, block / parts / params.batch);
    let (own_warp, warps) = (thread::warp(), M::numbers().pack_threads / 32);
    let (mut operand, row) = if before_profiling {
        (K + part, own_warp)
    } else if part == V {
        (V, own_warp)
    } else {
        (own_warp % 2, part * (warps / 2) + own_warp / 2)
    };
    let rows = M::layout().packed_rows();
    let image_bytes = M::image_bytes();
    let (mut item, mut row) = (item, group * warps + row);
    // Which of a head's samples the row is, and the head.
    let (mut sample, mut chosen) = (0, 0);
    let mut first_image = (item * params.heads) as u64 * image_bytes;
    if before_profiling && row >= rows {
        let of_head = M::partials(1).group_rows();
        let first = rows / warps * parts * params.batch;
        let index = (block - first) * warps + own_warp;
        let head = index / of_head;
        if head >= params.batch * params.heads {
            return;
        }
        (operand, item, chosen, sample) = (Q, head / params.heads, head % params.heads, index % of_head);
        row = before_tokens + sampled_video_row::<M>(params.seed, head, sample);
        // The image of these samples is found as that of the chosen head.
        let image = head as u64 * M::IMAGE.bytes(of_head) as u64;
        first_image = image.wrapping_sub(chosen as u64 * image_bytes);
    }
    let (packed, norm, norm_before, norm_after) = match operand {
        Q => (params.packed_q, params.q_norm, params.q_norm_before, params.q_norm_after),
        K => (params.packed_k, params.k_norm, params.k_norm_before, params.k_norm_after),
        _ => (params.packed_v, NormWeights::default(), NormWeights::default(), NormWeights::default()),
    };

    let valid = valid_text::<M>(params.before_lengths, params.after_lengths, item);
    if before_profiling && operand != Q {
        let key = M::layout().packed_row(HeadType::Spatial, row, valid);
        if key < params.first_key || key >= params.end_key {
            return;
        }
    }
    let is_before = row < before_tokens;
    let first_after = before_tokens + M::layout().video_tokens();
    let is_after = row >= first_after;
    // Packed rows of padding and of invalid text are zero.
    let blank = (is_before && row >= valid.before) || (is_after && row - first_after >= valid.after);
    let norm = if is_before {
        norm_before
    } else if is_after {
        norm_after
    } else {
        norm
    };
    let normed = M::numbers().has_norm && operand != V && !blank;
    let rotated = M::numbers().has_rope && operand != V && !blank;
    let rotated = rotated && (rope_before || !is_before) && (rope_after || !is_after);
    let rope_row = if rope_before { row } else { row.wrapping_sub(before_tokens) };

    let [video, before, after] = match operand {
        Q => [params.q, params.q_before, params.q_after],
        K => [params.k, params.k_before, params.k_after],
        _ => [params.v, params.v_before, params.v_after],
    };
    let source = if is_before {
        before
    } else if is_after {
        after
    } else {
        video
    };
    let chunk = chunk::<M>();
    let element_bytes = M::Element::DTYPE.bytes() as u64;
    let head_bytes = source.head * element_bytes;
    let mut heads = Heads {
        count: params.heads,
        source: source.data
            + (item as u64 * source.batch + row as u64 * source.row + (chunk * 8) as u64) * element_bytes
            + head_of::<M>(0) as u64 * head_bytes,
        stride: heads_at_once::<M>() as u64 * head_bytes,
        aligned: params.aligned != 0,
        types: if before_profiling && operand == Q {
            chosen as u64 + 1
        } else if params.head_types == 0 {
            0
        } else {
            params.head_types + (item * params.heads) as u64 * 4
        },
        precisions: if params.precisions == 0 { 0 } else { params.precisions + (item * params.heads) as u64 * 4 },
        only_temporal: params.pass == PackPass::AfterProfiling as u32 && operand != Q,
        blank,
        all_read: normed && M::numbers().norm_over_heads,
        held: Held {
            address: shared::address(M::pack_shared().held, own_warp) + thread::lane() * CHUNK_BYTES,
            first: u32::MAX,
            temporal: 0,
            written: 0,
            read: 0,
        },
    };

    // What all heads of the token share stays in registers. Where each head has weights of its own,
    // those of the next step are on their way while others work.
    let has_own_weights = normed && M::numbers().norm_over_heads;
    let own = |head: u32| if has_own_weights { head.min(params.heads - 1) * M::HEAD_DIM } else { 0 };
    let mut affine = Affine::IDENTITY;
    if normed {
        affine.load::<M>(norm, own(head_of::<M>(0)) + chunk * 8);
    }
    let scale = if operand == Q { params.scale_log2 } else { 1.0 };
    let scale = if in_8_bits { scale * hadamard::FACTOR } else { scale };
    let tables = Tables::of_item(params, item);
    let token_rotation = if rotated && !M::numbers().rope_per_head {
        Rotation::load::<M>(tables, rope_row, chunk).scaled(scale)
    } else {
        Rotation::IDENTITY
    };
    let token_statistic =
        if normed && M::numbers().norm_over_heads { token_statistic::<M>(&mut heads) } else { Statistic::IDENTITY };
    let place = |head_type: HeadType| {
        if before_profiling && operand == Q {
            return M::IMAGE.chunk(sample, chunk);
        }
        let order = if operand == Q { M::layout().query_order() } else { M::layout() };
        let row = order.packed_row(head_type, row, valid);
        // In 8 bits, two lanes share a chunk.
        if in_8_bits { e4m3_image::chunk(row, chunk / 2) + chunk % 2 * 8 } else { M::IMAGE.chunk(row, chunk) }
    };
    let images = packed.wrapping_add(first_image);
    let (spatial_place, temporal_place) = (place(HeadType::Spatial), place(HeadType::Temporal));

    heads.each::<M>(
        #[inline(always)]
        |Head { index, temporal, written, mut values, .. }| {
            if operand != V && warp::any(written) {
                // Lanes without a head go with the others, since all exchange values.
                let head = if written { index } else { 0 };
                let mut x = element::widen::<M::Element>(values);
                if normed {
                    let statistic = if has_own_weights { token_statistic } else { head_statistic::<M>(x) };
                    x = affine.apply::<M>(x, statistic);
                }
                if rotated {
                    let rotation = if M::numbers().rope_per_head {
                        Rotation::load::<M>(tables, rope_row * params.heads + head, chunk).scaled(scale)
                    } else {
                        token_rotation
                    };
                    x = rotation.apply::<M>(x, chunk);
                } else {
                    x = x.map(
                        #[inline(always)]
                        |x| x * scale,
                    );
                }
                if in_8_bits {
                    let [a, b, c, d, e, f, g, h] = hadamard::transform(x);
                    values = [element::pack_e4m3([a, b, c, d]), element::pack_e4m3([e, f, g, h]), 0, 0];
                } else {
                    values = element::narrow::<M::Element>(x);
                }
            }
            if has_own_weights {
                affine.load::<M>(norm, own(index + heads_at_once::<M>()) + chunk * 8);
            }
            if written {
                let image = images + index as u64 * image_bytes;
                let place = if temporal { temporal_place } else { spatial_place };
                if in_8_bits {
                    global::store8(image + place as u64, [values[0], values[1]]);
                } else {
                    global::store16(image + place as u64, values);
                }
            }
        },
    );
}

/// The operands. V is also the number of the block, of three, that has it.
const Q: u32 = 0;
const K: u32 = 1;
const V: u32 = 2;
