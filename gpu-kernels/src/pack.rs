//! **pack**: QK-norm, RoPE and reordering in one pass over Q, K and V.
//!
//! One warp a token, for all of its heads: the token's cosines and sines are read once, its row of heads x head_dim is read in
//! order, and each head's part goes to where the head's layout wants it, in the image of
//! [`packed_bytes`](framestride_shapes::launch::packed_bytes). Grid: x = packed_rows / 8, y = Q, K, V, z = batch.

use crate::attention::valid_text;
use crate::cuda::{global, math, thread, warp};
use crate::element;
use crate::cuda::mma::TileProducts;
use crate::shape::{Norm, Rope, Shape};
use framestride_shapes::launch::{NormWeights, PackParams, PackPass, Tensor};
use framestride_shapes::layout::{ATOM_ROWS, HeadType};

type ElementOf<T> = <<T as Shape>::Attention as TileProducts>::Element;

/// A token and what all of its heads share.
struct Token {
    /// Row of the model's order; from S on, padding.
    row: u32,
    /// Whether it is padding or invalid text: its packed rows are zero.
    blank: bool,
    valid_text: u32,
    norm: NormWeights,
    /// Row of the RoPE tables, if it is rotated.
    rope_row: Option<u32>,
}

/// The kernel's body.
///
/// # Safety
/// Launched with the table that `attention_kernels!` wrote for `T`; `params` as its documentation says.
#[inline(always)]
pub unsafe fn pack<T: Shape>(params: &PackParams) {
    let item = thread::block_z();
    let row = thread::block_x() * ATOM_ROWS + thread::warp();
    let (source, packed, norm, text_norm) = match thread::block_y() {
        0 => (params.q, params.packed_q, Some(params.q_norm), params.q_norm_text),
        1 => (params.k, params.packed_k, Some(params.k_norm), params.k_norm_text),
        _ => (params.v, params.packed_v, None, params.k_norm_text),
    };
    let valid_text = valid_text::<T>(params.text_lengths, item);
    let text = row.wrapping_sub(T::LAYOUT.first_text_row());
    let is_text = text < T::LAYOUT.text_tokens;
    let rotated = !matches!(T::ROPE, Rope::None) && norm.is_some() && (T::ROPE_TEXT || !is_text);
    let rope_row = if T::ROPE_TEXT { row } else { row - T::LAYOUT.first_video_row() };
    let token = Token {
        row,
        blank: row >= T::LAYOUT.sequence() || (is_text && text >= valid_text),
        valid_text,
        norm: if is_text { text_norm } else { norm.unwrap_or_default() },
        rope_row: if rotated { Some(rope_row) } else { None },
    };
    let source = Tensor { data: source.data + item as u64 * source.batch * 2, ..source };
    write_heads::<T>(params, item, &token, &source, packed, norm.is_some());
}

/// All heads of one token of Q, K (`normed`, perhaps rotated) or V.
#[inline(always)]
unsafe fn write_heads<T: Shape>(
    params: &PackParams,
    item: u32,
    token: &Token,
    source: &Tensor,
    packed: u64,
    normed: bool,
) {
    let row_bytes = T::HEAD_DIM * 2;
    // Lanes of one head, 8 elements each, and heads of one warp.
    let head_lanes = T::HEAD_DIM / 8;
    let heads_at_once = 32 / head_lanes;
    let lane = thread::lane();
    let (chunk, first_head) = (lane % head_lanes, lane / head_lanes);
    let normed = normed && !matches!(T::NORM, Norm::None) && !token.blank;

    let token_statistic = if normed && T::NORM_OVER_HEADS {
        let mut sums = Moments::default();
        let mut head = first_head;
        while head < params.heads {
            sums = sums.plus(Moments::of(load::<T>(params, source, token.row, head, chunk)));
            head += heads_at_once;
        }
        let sums = sums.summed::<32>();
        let mean = sums.mean(T::HEADS * T::HEAD_DIM);
        let mut squares = 0.0;
        if matches!(T::NORM, Norm::Layer) {
            let mut head = first_head;
            while head < params.heads {
                squares += squared_distance(load::<T>(params, source, token.row, head, chunk), mean);
                head += heads_at_once;
            }
            squares = warp::sum::<32>(squares);
        }
        Statistic::new::<T>(sums, squares, T::HEADS * T::HEAD_DIM)
    } else {
        Statistic { mean: 0.0, factor: 1.0 }
    };

    // All lanes go round as often as the first head's, since they exchange values.
    let mut base = 0;
    while base < params.heads {
        let head = base + first_head;
        base += heads_at_once;
        let exists = head < params.heads;
        let head_type = if params.head_types == 0 || !exists {
            HeadType::Spatial
        } else {
            HeadType::from_u32(global::load_u32(params.head_types + (item * params.heads + head) as u64 * 4))
        };
        let wanted = exists && (params.pass != PackPass::Temporal as u32 || matches!(head_type, HeadType::Temporal));
        if !warp::any(wanted) {
            continue;
        }
        let mut values = [0u32; 4];
        if wanted && !token.blank {
            values = load_raw::<T>(params, source, token.row, head, chunk);
        }
        if normed || token.rope_row.is_some() {
            let mut x = element::widen::<ElementOf<T>>(values);
            if normed {
                let statistic = if T::NORM_OVER_HEADS { token_statistic } else { head_statistic::<T>(x) };
                let weights_row = if T::NORM_OVER_HEADS { head } else { 0 };
                x = affine(x, statistic, token.norm, weights_row * T::HEAD_DIM + chunk * 8, wanted);
            }
            if let Some(row) = token.rope_row {
                let table_row = if T::ROPE_PER_HEAD { row * params.heads + head } else { row };
                x = rotate::<T>(params, x, table_row, chunk, wanted && !token.blank);
            }
            values = element::narrow::<ElementOf<T>>(x);
        }
        if wanted {
            if token.blank {
                values = [0; 4];
            }
            let packed_row = if token.row < T::LAYOUT.sequence() {
                T::LAYOUT.packed_row(head_type, token.row, token.valid_text)
            } else {
                token.row
            };
            let head_image = (item * params.heads + head) as u64 * (T::LAYOUT.packed_rows() as u64 * row_bytes as u64);
            let row_in_atom = packed_row % ATOM_ROWS;
            let atom = packed_row / ATOM_ROWS * (T::HEAD_DIM / 64) + chunk / 8;
            let place = atom as u64 * 1024 + (row_in_atom * 128 + (chunk % 8 ^ row_in_atom) * 16) as u64;
            global::store16(packed + head_image + place, values);
        }
    }
}

/// Eight elements of a head's row.
#[inline(always)]
unsafe fn load_raw<T: Shape>(params: &PackParams, source: &Tensor, row: u32, head: u32, chunk: u32) -> [u32; 4] {
    let address = source.data + (row as u64 * source.row + head as u64 * source.head + (chunk * 8) as u64) * 2;
    if params.aligned != 0 { global::load16(address) } else { global::load16_unaligned(address) }
}

#[inline(always)]
unsafe fn load<T: Shape>(params: &PackParams, source: &Tensor, row: u32, head: u32, chunk: u32) -> [f32; 8] {
    element::widen::<ElementOf<T>>(load_raw::<T>(params, source, row, head, chunk))
}

/// Sum and sum of squares of some elements.
#[derive(Clone, Copy, Default)]
struct Moments {
    sum: f32,
    squares: f32,
}

impl Moments {
    #[inline(always)]
    fn of(x: [f32; 8]) -> Moments {
        let mut moments = Moments::default();
        for x in x {
            moments.sum += x;
            moments.squares = math::fma(x, x, moments.squares);
        }
        moments
    }
    #[inline(always)]
    fn plus(self, other: Moments) -> Moments {
        Moments { sum: self.sum + other.sum, squares: self.squares + other.squares }
    }
    #[inline(always)]
    unsafe fn summed<const LANES: u32>(self) -> Moments {
        Moments { sum: warp::sum::<LANES>(self.sum), squares: warp::sum::<LANES>(self.squares) }
    }
    #[inline(always)]
    fn mean(self, count: u32) -> f32 {
        self.sum / count as f32
    }
}

/// Sum of (x - mean)^2.
#[inline(always)]
fn squared_distance(x: [f32; 8], mean: f32) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum = math::fma(x - mean, x - mean, sum);
    }
    sum
}

/// y = (x - mean) factor, before weight and bias.
#[derive(Clone, Copy)]
struct Statistic {
    mean: f32,
    factor: f32,
}

impl Statistic {
    /// From the sums over `count` elements; `distance` is the sum of squared distances to the mean, for a layer norm (the
    /// difference of moments would cancel).
    #[inline(always)]
    fn new<T: Shape>(sums: Moments, distance: f32, count: u32) -> Statistic {
        match T::NORM {
            Norm::Layer => Statistic {
                mean: sums.mean(count),
                factor: math::reciprocal_sqrt(distance / count as f32 + T::NORM_EPS),
            },
            _ => Statistic { mean: 0.0, factor: math::reciprocal_sqrt(sums.squares / count as f32 + T::NORM_EPS) },
        }
    }
}

/// The statistic of one head's row, over the lanes that hold it.
#[inline(always)]
unsafe fn head_statistic<T: Shape>(x: [f32; 8]) -> Statistic {
    if T::HEAD_DIM == 64 { head_statistic_over::<T, 8>(x) } else { head_statistic_over::<T, 16>(x) }
}

#[inline(always)]
unsafe fn head_statistic_over<T: Shape, const LANES: u32>(x: [f32; 8]) -> Statistic {
    let sums = Moments::of(x).summed::<LANES>();
    let distance = match T::NORM {
        Norm::Layer => warp::sum::<LANES>(squared_distance(x, sums.mean(T::HEAD_DIM))),
        _ => 0.0,
    };
    Statistic::new::<T>(sums, distance, T::HEAD_DIM)
}

/// Applies the statistic, and weight and bias from element `first` on.
#[inline(always)]
unsafe fn affine(mut x: [f32; 8], statistic: Statistic, norm: NormWeights, first: u32, wanted: bool) -> [f32; 8] {
    let mut weight = [1.0; 8];
    let mut bias = [0.0; 8];
    if wanted && norm.weight != 0 {
        weight = load8(norm.weight + first as u64 * 4);
    }
    if wanted && norm.bias != 0 {
        bias = load8(norm.bias + first as u64 * 4);
    }
    let mut i = 0;
    while i < 8 {
        x[i] = math::fma((x[i] - statistic.mean) * statistic.factor, weight[i], bias[i]);
        i += 1;
    }
    x
}

/// Eight f32.
#[inline(always)]
unsafe fn load8(address: u64) -> [f32; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (global::load_f32x4(address), global::load_f32x4(address + 16));
    [a, b, c, d, e, f, g, h]
}

/// Rotates a lane's eight elements: (a, b) -> (a cos - b sin, a sin + b cos).
#[inline(always)]
unsafe fn rotate<T: Shape>(params: &PackParams, x: [f32; 8], table_row: u32, chunk: u32, wanted: bool) -> [f32; 8] {
    let row = table_row as u64 * (T::HEAD_DIM / 2 * 4) as u64;
    let mut out = x;
    if matches!(T::ROPE, Rope::Interleaved) {
        if wanted {
            let place = row + (chunk * 16) as u64;
            let (cos, sin) = (global::load_f32x4(params.cos + place), global::load_f32x4(params.sin + place));
            let mut i = 0;
            while i < 4 {
                out[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
                out[2 * i + 1] = x[2 * i] * sin[i] + x[2 * i + 1] * cos[i];
                i += 1;
            }
        }
    } else {
        let half_lanes = T::HEAD_DIM / 16;
        let partner = exchange8(x, half_lanes);
        if wanted {
            let place = row + (chunk % half_lanes * 32) as u64;
            let (cos, sin) = (load8(params.cos + place), load8(params.sin + place));
            // The first half holds a, the second b.
            let sign = if chunk < half_lanes { -1.0 } else { 1.0 };
            let mut i = 0;
            while i < 8 {
                out[i] = x[i] * cos[i] + sign * partner[i] * sin[i];
                i += 1;
            }
        }
    }
    out
}

#[inline(always)]
unsafe fn exchange8(x: [f32; 8], mask: u32) -> [f32; 8] {
    let mut out = x;
    let mut i = 0;
    while i < 8 {
        out[i] = warp::exchange(x[i], mask);
        i += 1;
    }
    out
}
