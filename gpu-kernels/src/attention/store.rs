//! How the output of a query tile gets where the model wants it, divided by the sums of its
//! weights.

use super::work::Work;
use crate::cuda::mma::Fragment;
use crate::cuda::{global, math, warp};
use crate::element::Element;
use crate::model::Model;
use framestride_shapes::image::CHUNK_BYTES;
use framestride_shapes::params::AttentionParams;

/// The weights of a thread's two rows.
pub struct Sums {
    /// A weight is 2^(score + offset).
    pub offset: [f32; 2],
    /// Their sums.
    pub total: [f32; 2],
}

/// Writes the thread's two rows, divided by the sums of their weights, to the model's order.
/// `thread_rows` are their packed rows. `finish` gets a group of 8 columns and a mean over the weights of
/// each of the two columns that the thread has there, and says what is written.
///
/// # Safety
/// All lanes of the warp come here, after the last product.
#[inline(always)]
pub unsafe fn store<M: Model>(
    params: &AttentionParams,
    work: &Work<M>,
    output: &mut impl Fragment,
    Sums { offset, total }: Sums,
    thread_rows: [u32; 2],
    lane: u32,
    finish: impl Fn(u32, [f32; 2]) -> [f32; 2],
) {
    // What depends on the lane alone is computed here. It would take registers all through the
    // tiles otherwise.
    let lane = math::opaque(lane);
    let seen_end = work.valid.sum() + M::layout().video_tokens();
    let (item, head) = (work.head / params.heads, work.head % params.heads);
    let mut address = [0u64; 2];
    let mut factor = [0.0f32; 2];
    let mut row = 0;
    while row < 2 {
        let packed = thread_rows[row];
        if packed < M::layout().sequence() {
            let model_row = M::layout().query_order().model_row(work.head_type, packed, work.valid);
            let out = &params.out;
            address[row] = out.data
                + (item as u64 * out.batch + model_row as u64 * out.row + head as u64 * out.head)
                    * M::Element::DTYPE.bytes() as u64
                + (lane % 4 * CHUNK_BYTES) as u64;
            let live = packed < seen_end;
            if live {
                factor[row] = math::reciprocal(total[row]);
            }
            if params.lse != 0 && lane % 4 == 0 {
                let lse = (math::log2(total[row]) - offset[row]) * core::f32::consts::LN_2;
                let lse = if live { lse } else { f32::NEG_INFINITY };
                global::store_f32(
                    params.lse + (work.head as u64 * M::layout().sequence() as u64 + model_row as u64) * 4,
                    lse,
                );
            }
        }
        row += 1;
    }
    // Four groups of 8 columns are written at a time. Lane q of a quad holds two columns of each.
    // After transposing the quad it holds all 8 of group q, a chunk of 16 bytes.
    let mut pairs = [[0u32; 4]; 2];
    output.for_each_group(
        #[inline(always)]
        |group, values| {
            let [a, b, c, d] = values.map(|value| *value);
            // A row of invalid text is zero whatever it summed, and 0 x NaN would not be.
            let written = |x: f32, y: f32, row: usize| {
                let [x, y] = finish(group, [x * factor[row], y * factor[row]]);
                if factor[row] == 0.0 { M::Element::pack(0.0, 0.0) } else { M::Element::pack(x, y) }
            };
            let slot = (group % 4) as usize;
            pairs[0][slot] = written(a, b, 0);
            pairs[1][slot] = written(c, d, 1);
            if slot == 3 {
                let offset = (group / 4 * 4 * CHUNK_BYTES) as u64;
                store_chunk(address[0], offset, transpose_quad(pairs[0], lane), params.aligned);
                store_chunk(address[1], offset, transpose_quad(pairs[1], lane), params.aligned);
            }
        },
    );
}

/// Stores 16 bytes of a row. A row that does not exist has address 0.
#[inline(always)]
unsafe fn store_chunk(address: u64, offset: u64, chunk: [u32; 4], aligned: u32) {
    if address != 0 {
        if aligned != 0 {
            global::store16(address + offset, chunk);
        } else {
            global::store16_unaligned(address + offset, chunk);
        }
    }
}

/// Transposes a quad: lane q gives value g to lane g, and gets as value p what lane p held as value
/// q.
#[inline(always)]
unsafe fn transpose_quad(mut x: [u32; 4], lane: u32) -> [u32; 4] {
    // There are two butterfly rounds: across bit 1 of lane and index, then across bit 0.
    let high = lane & 2 != 0;
    let (a, b) = if high { (x[0], x[1]) } else { (x[2], x[3]) };
    let (a, b) = (warp::exchange(a, 2), warp::exchange(b, 2));
    if high {
        (x[0], x[1]) = (a, b);
    } else {
        (x[2], x[3]) = (a, b);
    }
    let odd = lane & 1 != 0;
    let (a, b) = if odd { (x[0], x[2]) } else { (x[1], x[3]) };
    let (a, b) = (warp::exchange(a, 1), warp::exchange(b, 1));
    if odd {
        (x[0], x[2]) = (a, b);
    } else {
        (x[1], x[3]) = (a, b);
    }
    x
}
