//! **pack**: QK-norm, RoPE and reordering in one pass over Q, K and V.
//!
//! One warp a row: a token's heads of Q, K or V. It starts copies of all of the row to shared memory at once, which is enough in
//! flight to hide the latency of memory and lets a norm over all heads see the row before it is written; then each head's part is
//! normed, rotated, scaled (Q) and stored where the head's layout wants it, in the image of
//! [`packed_bytes`](framestride_shapes::launch::packed_bytes). A lane reads only what it has copied itself, so that warps never wait
//! for each other. Grid: x = packed_rows / warps of a block, y = 3, z = batch.

use crate::attention::valid_text;
use crate::cuda::mma::TileProducts;
use crate::cuda::{copy, global, math, shared, thread, warp};
use crate::element;
use crate::shape::Shape;
use framestride_shapes::launch::{NormWeights, PACK_STEP_BYTES, PackParams, PackPass, pack_held_steps, pack_warps};
use framestride_shapes::layout::{ATOM_ROWS, HeadType};
use framestride_shapes::operators::{NormKind, NormOver, Pairs};

type ElementOf<T> = <<T as Shape>::Attention as TileProducts>::Element;

/// Whether the QK-norm has one statistic for all heads of a token.
#[inline(always)]
fn norm_over_heads<T: Shape>() -> bool {
    T::QK_NORM.is_some_and(|norm| matches!(norm.over, NormOver::Heads))
}

#[inline(always)]
fn is_layer_norm<T: Shape>() -> bool {
    T::QK_NORM.is_some_and(|norm| matches!(norm.kind, NormKind::Layer))
}

#[inline(always)]
fn rotates_text<T: Shape>() -> bool {
    T::ROPE.is_some_and(|rope| rope.text)
}

#[inline(always)]
fn rotates_per_head<T: Shape>() -> bool {
    T::ROPE.is_some_and(|rope| rope.per_head)
}

#[inline(always)]
fn is_interleaved<T: Shape>() -> bool {
    T::ROPE.is_some_and(|rope| matches!(rope.pairs, Pairs::Interleaved))
}

/// The kernel's body.
///
/// # Safety
/// Launched with the table that `attention_kernels!` wrote for `T`; `params` as its documentation says.
#[inline(always)]
pub unsafe fn pack<T: Shape>(params: &PackParams) {
    // Rows that read the same tables of RoPE are near each other: blocks start in the order of x, y, z, so three in a row take some
    // tokens, one a warp, of one item and the next three the same of the next item, whose tables L2 still has; of the three, two have
    // Q and K of half of the tokens, whose tables L1 has, and one has V.
    let block = thread::block_x() + thread::blocks_x() * (thread::block_y() + 3 * thread::block_z());
    if block == 0 && thread::index() == 0 {
        global::store_u32(params.schedule, 0);
        global::store_u32(params.schedule + 4, 0);
    }
    // A division by what might be zero would come with a branch to a trap.
    core::hint::assert_unchecked(params.batch != 0);
    let (part, item, group) = (block % 3, block / 3 % params.batch, block / 3 / params.batch);
    let (own_warp, warps) = (thread::warp(), pack_warps(T::HEADS, T::HEAD_DIM));
    let (operand, row) = if part == V { (V, own_warp) } else { (own_warp % 2, part * (warps / 2) + own_warp / 2) };
    let row = group * warps + row;
    let (source, packed, norm, text_norm) = match operand {
        Q => (params.q, params.packed_q, params.q_norm, params.q_norm_text),
        K => (params.k, params.packed_k, params.k_norm, params.k_norm_text),
        _ => (params.v, params.packed_v, NormWeights::default(), NormWeights::default()),
    };

    let valid_text = valid_text::<T>(params.text_lengths, item);
    let text = row.wrapping_sub(T::LAYOUT.first_text_row());
    let is_text = text < T::LAYOUT.text_tokens;
    let is_padding = row >= T::LAYOUT.sequence();
    // Packed rows of padding and of invalid text are zero.
    let blank = is_padding || (is_text && text >= valid_text);
    let norm = if is_text { text_norm } else { norm };
    let normed = T::QK_NORM.is_some() && operand != V && !blank;
    let rotated = T::ROPE.is_some() && operand != V && !blank && (rotates_text::<T>() || !is_text);
    let rope_row = if rotates_text::<T>() { row } else { row.wrapping_sub(T::LAYOUT.first_video_row()) };

    let chunk = chunk::<T>();
    let mut heads = Heads {
        count: params.heads,
        source: source.data + (item as u64 * source.batch + row as u64 * source.row + (chunk * 8) as u64) * 2,
        stride: source.head * 2,
        aligned: params.aligned != 0,
        types: if params.head_types == 0 { 0 } else { params.head_types + (item * params.heads) as u64 * 4 },
        only_temporal: params.pass == PackPass::Temporal as u32,
        blank,
        all_read: normed && norm_over_heads::<T>(),
        held: Held {
            address: shared::base() + own_warp * held_steps::<T>() * PACK_STEP_BYTES + thread::lane() * 16,
            first: u32::MAX,
            temporal: 0,
            written: 0,
            read: 0,
        },
    };

    // What all heads of the token share stays in registers.
    let token_affine =
        if normed && !norm_over_heads::<T>() { Affine::load::<T>(norm, chunk * 8) } else { Affine::IDENTITY };
    let scale = if operand == Q { params.scale_log2 } else { 1.0 };
    let token_rotation = if rotated && !rotates_per_head::<T>() {
        Rotation::load::<T>(params, rope_row, chunk).scaled(scale)
    } else {
        Rotation::IDENTITY
    };
    let token_statistic =
        if normed && norm_over_heads::<T>() { token_statistic::<T>(&mut heads) } else { Statistic::IDENTITY };
    let image_bytes = (T::LAYOUT.packed_rows() * T::HEAD_DIM * 2) as u64;
    let place = |head_type: HeadType| {
        let order = if operand == Q { T::LAYOUT.query_order() } else { T::LAYOUT };
        let packed_row = if is_padding { row } else { order.packed_row(head_type, row, valid_text) };
        let (atom_row, row) = (packed_row / ATOM_ROWS, packed_row % ATOM_ROWS);
        (atom_row * (T::HEAD_DIM / 64) + chunk / 8) * 1024 + row * 128 + (chunk % 8 ^ row) * 16
    };
    let (spatial_place, temporal_place) = (place(HeadType::Spatial), place(HeadType::Temporal));

    heads.each::<T>(
        #[inline(always)]
        |Head { index, temporal, written, mut values, .. }| {
            if operand != V && warp::any(written) {
                // Lanes without a head go with the others, since all exchange values.
                let head = if written { index } else { 0 };
                let mut x = element::widen::<ElementOf<T>>(values);
                if normed {
                    x = if norm_over_heads::<T>() {
                        Affine::load::<T>(norm, head * T::HEAD_DIM + chunk * 8).apply(x, token_statistic)
                    } else {
                        token_affine.apply(x, head_statistic::<T>(x))
                    };
                }
                if rotated {
                    let rotation = if rotates_per_head::<T>() {
                        Rotation::load::<T>(params, rope_row * params.heads + head, chunk).scaled(scale)
                    } else {
                        token_rotation
                    };
                    x = rotation.apply::<T>(x);
                } else {
                    x = x.map(
                        #[inline(always)]
                        |x| x * scale,
                    );
                }
                values = element::narrow::<ElementOf<T>>(x);
            }
            if written {
                let image = packed + (item * params.heads + index) as u64 * image_bytes;
                let place = if temporal { temporal_place } else { spatial_place };
                global::store16(image + place as u64, values);
            }
        },
    );
}

/// Operands, and the block of three that has V.
const Q: u32 = 0;
const K: u32 = 1;
const V: u32 = 2;

/// Lanes of one head, 8 elements each.
#[inline(always)]
fn head_lanes<T: Shape>() -> u32 {
    T::HEAD_DIM / 8
}

/// Heads of one step of the warp.
#[inline(always)]
fn heads_at_once<T: Shape>() -> u32 {
    32 / head_lanes::<T>()
}

/// Which of a head's lanes this is.
#[inline(always)]
fn chunk<T: Shape>() -> u32 {
    thread::lane() % head_lanes::<T>()
}

/// Steps of the warp, of 16 bytes a lane, that it holds at once in its part of shared memory.
#[inline(always)]
fn held_steps<T: Shape>() -> u32 {
    pack_held_steps(T::HEADS, T::HEAD_DIM)
}

/// The heads of one row, as a lane sees them: in each step 16 bytes of one, beside those that the other lanes see.
struct Heads {
    /// Heads of the launch.
    count: u32,
    /// Address of the lane's 16 bytes of head 0, and bytes from one head to the next.
    source: u64,
    stride: u64,
    aligned: bool,
    /// Address of the item's head types; 0 when all heads are spatial.
    types: u64,
    /// Whether only temporal heads are written.
    only_temporal: bool,
    /// Whether the row is zero, whatever the tensor holds.
    blank: bool,
    /// Whether heads that are not written are read too.
    all_read: bool,
    /// The part of the row that is held in shared memory.
    held: Held,
}

/// Up to 32 steps in shared memory. Bit i of a mask is for step `first` + i.
struct Held {
    /// Shared address of the lane's 16 bytes of the first step.
    address: u32,
    first: u32,
    /// Whose head is temporal.
    temporal: u32,
    /// Whose head is written.
    written: u32,
    /// Whose head is read; of the others nothing is held.
    read: u32,
}

/// A lane's part of one head.
struct Head {
    index: u32,
    temporal: bool,
    written: bool,
    read: bool,
    /// Eight elements; zero when they are not read.
    values: [u32; 4],
}

impl Heads {
    /// Calls `f` with every head, as often in all lanes.
    #[inline(always)]
    unsafe fn each<T: Shape>(&mut self, mut f: impl FnMut(Head)) {
        let steps = self.count.div_ceil(heads_at_once::<T>());
        let mut first = 0;
        while first < steps {
            let count = held_steps::<T>().min(steps - first);
            // Held from the last time when the whole row has room.
            if self.held.first != first {
                self.hold::<T>(first, count);
            }
            let held = &self.held;
            let mut index = head_of::<T>(first);
            let mut i = 0;
            while i < count {
                let is = |mask: u32| mask >> i & 1 != 0;
                let read = is(held.read);
                let values = if read { shared::load16(held.address + i * PACK_STEP_BYTES) } else { [0; 4] };
                f(Head { index, temporal: is(held.temporal), written: is(held.written), read, values });
                index += heads_at_once::<T>();
                i += 1;
            }
            first += count;
        }
    }

    /// Brings `count` steps from `first` on to shared memory.
    #[inline(always)]
    unsafe fn hold<T: Shape>(&mut self, first: u32, count: u32) {
        let (mut present, mut temporal) = (0, 0);
        let mut i = 0;
        while i < held_steps::<T>() {
            // Each lane of a head looks at another step.
            let head = head_of::<T>(first + i + chunk::<T>());
            let is_present = head < self.count;
            let is_temporal = is_present
                && self.types != 0
                && global::load_u32(self.types + head as u64 * 4) == HeadType::Temporal as u32;
            let seen =
                |by_lane: u32| (by_lane >> (thread::lane() - chunk::<T>()) & ((1 << head_lanes::<T>()) - 1)) << i;
            present |= seen(warp::ballot(is_present));
            temporal |= seen(warp::ballot(is_temporal));
            i += head_lanes::<T>();
        }
        let written = if self.only_temporal { temporal } else { present };
        let read = if self.all_read { present } else { written };
        self.held = Held { first, temporal, written, read: if self.blank { 0 } else { read }, ..self.held };

        if self.aligned {
            self.each_read::<T>(
                count,
                #[inline(always)]
                |to, from| copy::start16(to, from),
            );
            copy::wait_started();
        } else {
            self.each_read::<T>(
                count,
                #[inline(always)]
                |to, from| shared::store16(to, global::load16_unaligned(from)),
            );
        }
    }

    /// Calls `f` with the shared and the global address of the lane's 16 bytes, for each of `count` steps that is read.
    #[inline(always)]
    unsafe fn each_read<T: Shape>(&self, count: u32, f: impl Fn(u32, u64)) {
        let mut to = self.held.address;
        let mut from = self.source + head_of::<T>(self.held.first) as u64 * self.stride;
        let mut i = 0;
        while i < count {
            if self.held.read >> i & 1 != 0 {
                f(to, from);
            }
            to += PACK_STEP_BYTES;
            from += heads_at_once::<T>() as u64 * self.stride;
            i += 1;
        }
    }
}

/// The head of a step in this lane; one behind the last when there is none.
#[inline(always)]
fn head_of<T: Shape>(step: u32) -> u32 {
    step * heads_at_once::<T>() + thread::lane() / head_lanes::<T>()
}

/// The statistic of a norm over all heads.
#[inline(always)]
unsafe fn token_statistic<T: Shape>(heads: &mut Heads) -> Statistic {
    let (mut sum, mut distance) = (0.0, 0.0);
    if is_layer_norm::<T>() {
        heads.each::<T>(
            #[inline(always)]
            |head| sum += element::widen::<ElementOf<T>>(head.values).iter().sum::<f32>(),
        );
    }
    let mean = Statistic::mean::<T, 32>(sum, T::HEADS * T::HEAD_DIM);
    heads.each::<T>(
        #[inline(always)]
        |head| {
            if head.read {
                distance += squared_distance(element::widen::<ElementOf<T>>(head.values), mean);
            }
        },
    );
    Statistic::new::<T, 32>(mean, distance, T::HEADS * T::HEAD_DIM)
}

/// The statistic of one head's row, over the lanes that hold it.
#[inline(always)]
unsafe fn head_statistic<T: Shape>(x: [f32; 8]) -> Statistic {
    if T::HEAD_DIM == 64 { head_statistic_over::<T, 8>(x) } else { head_statistic_over::<T, 16>(x) }
}

#[inline(always)]
unsafe fn head_statistic_over<T: Shape, const LANES: u32>(x: [f32; 8]) -> Statistic {
    let mean = Statistic::mean::<T, LANES>(x.iter().sum(), T::HEAD_DIM);
    Statistic::new::<T, LANES>(mean, squared_distance(x, mean), T::HEAD_DIM)
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
    const IDENTITY: Statistic = Statistic { mean: 0.0, factor: 1.0 };

    /// What is taken off: the mean of `count` elements, of which each lane has summed some, or nothing in an RMS norm.
    #[inline(always)]
    unsafe fn mean<T: Shape, const LANES: u32>(sum: f32, count: u32) -> f32 {
        // Times the reciprocal of a constant: a division in full precision would be a call.
        if is_layer_norm::<T>() { warp::sum::<LANES>(sum) * (1.0 / count as f32) } else { 0.0 }
    }

    /// From the sum of squared distances to the mean, of which each lane has summed some.
    #[inline(always)]
    unsafe fn new<T: Shape, const LANES: u32>(mean: f32, distance: f32, count: u32) -> Statistic {
        let eps = match T::QK_NORM {
            Some(norm) => norm.eps as f32,
            None => 0.0,
        };
        let variance = warp::sum::<LANES>(distance) * (1.0 / count as f32);
        Statistic { mean, factor: math::reciprocal_sqrt(variance + eps) }
    }
}

/// Weight and bias of a lane's eight elements.
#[derive(Clone, Copy)]
struct Affine {
    weight: [f32; 8],
    bias: [f32; 8],
}

impl Affine {
    const IDENTITY: Affine = Affine { weight: [1.0; 8], bias: [0.0; 8] };

    /// From element `first` on.
    #[inline(always)]
    unsafe fn load<T: Shape>(norm: NormWeights, first: u32) -> Affine {
        let mut affine = Affine::IDENTITY;
        if norm.weight != 0 {
            affine.weight = load8(norm.weight + first as u64 * 4);
        }
        if is_layer_norm::<T>() && norm.bias != 0 {
            affine.bias = load8(norm.bias + first as u64 * 4);
        }
        affine
    }

    #[inline(always)]
    fn apply(&self, mut x: [f32; 8], statistic: Statistic) -> [f32; 8] {
        let mut i = 0;
        while i < 8 {
            x[i] = math::fma((x[i] - statistic.mean) * statistic.factor, self.weight[i], self.bias[i]);
            i += 1;
        }
        x
    }
}

/// Eight f32.
#[inline(always)]
unsafe fn load8(address: u64) -> [f32; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (global::load_f32x4(address), global::load_f32x4(address + 16));
    [a, b, c, d, e, f, g, h]
}

/// Cosines and sines of a lane's eight elements. Interleaved pairs share one: there the first four are used. Of halves, the sines of
/// the lower one are negative.
#[derive(Clone, Copy)]
struct Rotation {
    cos: [f32; 8],
    sin: [f32; 8],
}

impl Rotation {
    const IDENTITY: Rotation = Rotation { cos: [1.0; 8], sin: [0.0; 8] };

    /// From row `row` of the tables.
    #[inline(always)]
    unsafe fn load<T: Shape>(params: &PackParams, row: u32, chunk: u32) -> Rotation {
        let row = row as u64 * (T::HEAD_DIM / 2 * 4) as u64;
        let mut rotation = Rotation::IDENTITY;
        if is_interleaved::<T>() {
            let place = row + (chunk * 16) as u64;
            let (cos, sin) = (global::load_f32x4(params.cos + place), global::load_f32x4(params.sin + place));
            let mut i = 0;
            while i < 4 {
                (rotation.cos[i], rotation.sin[i]) = (cos[i], sin[i]);
                i += 1;
            }
        } else {
            let place = row + (chunk % (T::HEAD_DIM / 16) * 32) as u64;
            rotation = Rotation { cos: load8(params.cos + place), sin: load8(params.sin + place) };
            // The lower half of a head's lanes holds a, the upper half b.
            if chunk < T::HEAD_DIM / 16 {
                rotation.sin = rotation.sin.map(
                    #[inline(always)]
                    |sin| -sin,
                );
            }
        }
        rotation
    }

    /// A rotation that multiplies by `scale` as well.
    #[inline(always)]
    fn scaled(self, scale: f32) -> Rotation {
        let scaled = |values: [f32; 8]| {
            values.map(
                #[inline(always)]
                |value| value * scale,
            )
        };
        Rotation { cos: scaled(self.cos), sin: scaled(self.sin) }
    }

    /// Rotates (a, b) -> (a cos - b sin, b cos + a sin). All lanes of the warp take part.
    #[inline(always)]
    unsafe fn apply<T: Shape>(&self, x: [f32; 8]) -> [f32; 8] {
        let Rotation { cos, sin } = self;
        let mut out = x;
        if is_interleaved::<T>() {
            let mut i = 0;
            while i < 4 {
                let (a, b) = (x[2 * i], x[2 * i + 1]);
                out[2 * i] = math::fma(a, cos[i], -(b * sin[i]));
                out[2 * i + 1] = math::fma(b, cos[i], a * sin[i]);
                i += 1;
            }
        } else {
            let mut i = 0;
            while i < 8 {
                out[i] = math::fma(warp::exchange(x[i], T::HEAD_DIM / 16), sin[i], x[i] * cos[i]);
                i += 1;
            }
        }
        out
    }
}
