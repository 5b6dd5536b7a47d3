//! V for attention in 8 bits: its centers, and its transposed images.

use crate::cuda::{global, math, shared, thread, warp};
use crate::element::{self, Element};
use crate::model::{Model, valid_text};
use framestride_shapes::blocks::{CENTER_ROWS, CENTER_TEXT_ROWS, CENTER_THREADS, VALUES_THREADS, VALUES_UNITS};
use framestride_shapes::image::e4m3::{
    self, CENTER_COUNTED, CENTER_FACTOR, CENTER_FLOATS, CENTER_LOST, LOST_SCALE, UNIT_BYTES, UNIT_KEYS,
};
use framestride_shapes::layout::{HeadType, ValidText};
use framestride_shapes::params::{PackParams, Tensor};
use framestride_shapes::shared::CenterShared;

/// Lanes that share a row of a head. Each has 16 bytes of it, 8 channels.
const LANES: u32 = 16;

/// What lies where in the shared memory of **center**.
const CENTER_SHARED: CenterShared = CenterShared::new();

/// **center**: the mean of each channel of V, and its size, over a sample of the video.
///
/// Weights of a row sum up to 1. So any vector may be subtracted from the values and added to the
/// output. This one leaves the least to be rounded to 8 bits. A block takes a head. Grid: x =
/// batch x heads.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, and `params` is as its
/// documentation says.
#[inline(always)]
pub unsafe fn center<M: Model>(params: &PackParams) {
    let head = thread::block_x();
    if !M::has_head(params.precisions, head) {
        return;
    }
    let (chunk, group) = (thread::index() % LANES, thread::index() / LANES);
    let mut sums = [0.0; 8];
    each_sample::<M>(
        params,
        head,
        #[inline(always)]
        |i, value| sums[i] += value,
    );
    let place = |group: u32| shared::address(CENTER_SHARED.sums, group) + chunk * 16;
    shared::store16(place(group), [sums[0], sums[1], sums[2], sums[3]].map(f32::to_bits));
    shared::store16(place(group) + 256, [sums[4], sums[5], sums[6], sums[7]].map(f32::to_bits));
    thread::sync_block();
    let mut means = [0.0; 8];
    let mut group = 0;
    while group < CENTER_THREADS / LANES {
        let (low, high) = (shared::load16(place(group)), shared::load16(place(group) + 256));
        let mut i = 0;
        while i < 4 {
            means[i] += f32::from_bits(low[i]);
            means[i + 4] += f32::from_bits(high[i]);
            i += 1;
        }
        group += 1;
    }
    let means = means.map(
        #[inline(always)]
        |sum| sum * (1.0 / CENTER_ROWS as f32),
    );
    let (mut squares, mut most) = (0.0, 0.0f32);
    each_sample::<M>(
        params,
        head,
        #[inline(always)]
        |i, value| {
            let distance = value - means[i];
            squares = math::fma(distance, distance, squares);
            most = most.max(distance.abs());
        },
    );
    each_text_sample::<M>(
        params,
        head,
        #[inline(always)]
        |i, value| most = most.max((value - means[i]).abs()),
    );
    // Rows that differ from the sample may differ by as much as a mean.
    let mut i = 0;
    while i < 8 {
        most = most.max(means[i].abs());
        i += 1;
    }
    let (squares, most) = (warp::sum::<32>(squares), warp::max::<32>(most));
    if thread::lane() == 0 {
        shared::store_f32(shared::address(CENTER_SHARED.squares, thread::index() / 32), squares);
        shared::store_f32(shared::address(CENTER_SHARED.most, thread::index() / 32), most);
    }
    thread::sync_block();
    if thread::index() < LANES {
        let (mut squares, mut most) = (0.0, 0.0f32);
        let mut warp = 0;
        while warp < CENTER_THREADS / 32 {
            squares += shared::load_f32(shared::address(CENTER_SHARED.squares, warp));
            most = most.max(shared::load_f32(shared::address(CENTER_SHARED.most, warp)));
            warp += 1;
        }
        let [factor, inverse, counted] = factors(squares * (1.0 / (CENTER_ROWS * e4m3::ROW_BYTES) as f32), most);
        let center = params.centers + (head * CENTER_FLOATS) as u64 * 4;
        let mine = center + (chunk * 32) as u64;
        global::store16(mine, [means[0], means[1], means[2], means[3]].map(f32::to_bits));
        global::store16(mine + 16, [means[4], means[5], means[6], means[7]].map(f32::to_bits));
        let lost = center + (CENTER_LOST as u64 + chunk as u64 * 8) * 4;
        global::store16(lost, [0; 4]);
        global::store16(lost + 16, [0; 4]);
        if chunk == 0 {
            global::store_f32x2(center + CENTER_FACTOR as u64 * 4, [factor, inverse]);
            global::store_f32(center + CENTER_COUNTED as u64 * 4, counted);
        }
    }
}

/// The power of two by which values are multiplied, one over it, and the largest value of which is
/// counted what rounding took. The values have the mean square `square`, and none is larger than
/// `most`.
///
/// Their root mean square is 4 to 8 then, or less where `most` would become more than 256. So values
/// that were not looked at may be 56 times as large before they are cut off.
#[inline(always)]
fn factors(square: f32, most: f32) -> [f32; 3] {
    let exponent = |x: f32| (x.to_bits() >> 23) as i32 - 127;
    // The exponent of the root is half of the exponent. Beyond 2^60 on either side it is cut off.
    let size = (exponent(square) >> 1).clamp(-60, 60);
    let exponent = size.max(exponent(most) - 5).min(60);
    [2 - exponent, exponent - 2, 6 + size - exponent].map(
        #[inline(always)]
        |exponent| f32::from_bits(((127 + exponent) as u32) << 23),
    )
}

/// Calls `f` with each of a thread's sampled values, and the number of the channel in its chunk.
/// Samples are video rows at equal distances.
#[inline(always)]
unsafe fn each_sample<M: Model>(params: &PackParams, head: u32, mut f: impl FnMut(usize, f32)) {
    let (chunk, group) = (thread::index() % LANES, thread::index() / LANES);
    let mut sample = group;
    while sample < CENTER_ROWS {
        let video = (sample as u64 * M::layout().video_tokens() as u64 / CENTER_ROWS as u64) as u32;
        each_finite::<M::Element>(load::<M>(params, params.v, head, M::numbers().before_tokens + video, chunk), &mut f);
        sample += CENTER_THREADS / LANES;
    }
}

/// Calls `f` with each of a thread's sampled values of valid text, likewise.
#[inline(always)]
unsafe fn each_text_sample<M: Model>(params: &PackParams, head: u32, mut f: impl FnMut(usize, f32)) {
    let (chunk, group) = (thread::index() % LANES, thread::index() / LANES);
    let valid = valid_text::<M>(params.before_lengths, params.after_lengths, head / params.heads);
    let mut sample = group;
    while valid.sum() != 0 && sample < CENTER_TEXT_ROWS {
        // In the spatial layout, valid text comes first.
        let packed = (sample as u64 * valid.sum() as u64 / CENTER_TEXT_ROWS as u64) as u32;
        let row = M::layout().model_row(HeadType::Spatial, packed, valid);
        let values = if row < M::numbers().before_tokens {
            load::<M>(params, params.v_before, head, row, chunk)
        } else {
            load::<M>(params, params.v_after, head, row, chunk)
        };
        each_finite::<M::Element>(values, &mut f);
        sample += CENTER_THREADS / LANES;
    }
}

/// Calls `f` with each of the 8 values of a chunk, and its number. One value that is not finite would
/// make the whole head so, and counts as zero.
#[inline(always)]
fn each_finite<E: Element>(chunk: [u32; 4], f: &mut impl FnMut(usize, f32)) {
    let values = element::widen::<E>(chunk);
    let mut i = 0;
    while i < 8 {
        f(i, if values[i].abs() <= f32::MAX { values[i] } else { 0.0 });
        i += 1;
    }
}

/// 16 bytes of a row of a head: those of chunk `chunk`. `row` counts in the model's order, and `head`
/// over batch x heads.
#[inline(always)]
unsafe fn load<M: Model>(params: &PackParams, tensor: Tensor, head: u32, row: u32, chunk: u32) -> [u32; 4] {
    let (item, head) = (head / params.heads, head % params.heads);
    let element = item as u64 * tensor.batch + row as u64 * tensor.row + head as u64 * tensor.head + (chunk * 8) as u64;
    let address = tensor.data + element * M::Element::DTYPE.bytes() as u64;
    if params.aligned != 0 { global::load16(address) } else { global::load16_unaligned(address) }
}

/// **pack_values**: V without its mean, reordered and transposed ([`e4m3`]).
///
/// Each warp takes some units of 16 keys of a head. Heads of the same keys are worked on near each
/// other, since their rows lie beside each other in memory. What rounding took from the mean of a
/// channel is added up, and given back to the output. Grid: x = heads x blocks of units, y = batch.
///
/// # Safety
/// As for [`center`], which has run before.
#[inline(always)]
pub unsafe fn pack_values<M: Model>(params: &PackParams) {
    let layout = M::layout();
    // A division by what might be zero would come with a branch to a trap.
    core::hint::assert_unchecked(params.heads != 0 && layout.frames.value > layout.sink_frames);
    let (item, block) = (thread::block_y(), thread::block_x());
    let head = item * params.heads + block % params.heads;
    if !M::has_head(params.precisions, head) {
        return;
    }
    let first = (block / params.heads * (VALUES_THREADS / 32) + thread::warp()) * VALUES_UNITS;
    let units = e4m3::bytes(layout.packed_rows()) / UNIT_BYTES;
    let lane = thread::lane();
    // A lane has the even or the odd keys of its chunk of 8 channels.
    let (chunk, odd) = (lane % LANES, lane / LANES);
    let center = params.centers + (head * CENTER_FLOATS) as u64 * 4;
    let values = Values {
        head,
        head_type: if params.head_types == 0 {
            HeadType::Spatial
        } else {
            HeadType::from_u32(global::load_u32(params.head_types + head as u64 * 4))
        },
        valid: valid_text::<M>(params.before_lengths, params.after_lengths, item),
        chunk,
        odd,
        factor: global::load_f32(center + CENTER_FACTOR as u64 * 4),
    };
    let counted = global::load_f32(center + CENTER_COUNTED as u64 * 4);
    let mean = global::load_f32x8(center + (chunk * 32) as u64);
    let image = params.packed_v + head as u64 * M::IMAGE.bytes(layout.packed_rows()) as u64;
    let mut lost = [0.0; 8];
    let mut unit = first;
    while unit < units && unit < first + VALUES_UNITS {
        let place = image + (unit * UNIT_BYTES) as u64;
        let rows = values.load::<M>(params, unit);
        // This is spelled out, since arrays that a loop indexes would be in memory.
        let pairs = [
            Pair::new::<M::Element>(rows, 0, [mean[0], mean[1]], counted),
            Pair::new::<M::Element>(rows, 1, [mean[2], mean[3]], counted),
            Pair::new::<M::Element>(rows, 2, [mean[4], mean[5]], counted),
            Pair::new::<M::Element>(rows, 3, [mean[6], mean[7]], counted),
        ];
        let [a, b, c, d] = pairs.map(
            #[inline(always)]
            |pair| pair.lost,
        );
        let lost_here = [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]];
        let mut i = 0;
        while i < 8 {
            lost[i] += lost_here[i];
            i += 1;
        }
        let [a, b, c, d] = pairs.map(
            #[inline(always)]
            |pair| pair.keys,
        );
        // Of the 8 channels, the lane with the even keys stores the first four.
        let place = place + ((chunk * 8 + odd * 4) * UNIT_KEYS) as u64;
        store_channel(place, odd, a[0], c[0]);
        store_channel(place + UNIT_KEYS as u64, odd, a[1], c[1]);
        store_channel(place + 2 * UNIT_KEYS as u64, odd, b[0], d[0]);
        store_channel(place + 3 * UNIT_KEYS as u64, odd, b[1], d[1]);
        unit += 1;
    }
    // As fixed-point numbers, the sums do not depend on the order in which warps add to them. The
    // lanes of a chunk have different keys of the same channels.
    let mut channel = 0;
    while channel < 8 {
        let both = lost[channel] + warp::exchange(lost[channel], LANES);
        if channel / 4 == odd as usize {
            let place = center + (CENTER_LOST + chunk * 8 + channel as u32) as u64 * 4;
            global::add_u32(place, (both * LOST_SCALE) as i32 as u32);
        }
        channel += 1;
    }
}

/// What a lane has of the values of a head.
struct Values {
    head: u32,
    head_type: HeadType,
    valid: ValidText,
    chunk: u32,
    odd: u32,
    factor: f32,
}

impl Values {
    /// Every other row of a unit.
    #[inline(always)]
    unsafe fn load<M: Model>(&self, params: &PackParams, unit: u32) -> [Row; 8] {
        let first = unit * UNIT_KEYS + self.odd;
        [
            self.row::<M>(params, first),
            self.row::<M>(params, first + 2),
            self.row::<M>(params, first + 4),
            self.row::<M>(params, first + 6),
            self.row::<M>(params, first + 8),
            self.row::<M>(params, first + 10),
            self.row::<M>(params, first + 12),
            self.row::<M>(params, first + 14),
        ]
    }

    /// One row, by its packed row.
    #[inline(always)]
    unsafe fn row<M: Model>(&self, params: &PackParams, key: u32) -> Row {
        let layout = M::layout();
        if key >= self.valid.sum() + layout.video_tokens() {
            return Row { words: [0; 4], factor: 0.0 };
        }
        let row = layout.model_row(self.head_type, key, self.valid);
        let words = if row < layout.before {
            load::<M>(params, params.v_before, self.head, row, self.chunk)
        } else if row < layout.before + layout.video_tokens() {
            load::<M>(params, params.v, self.head, row, self.chunk)
        } else {
            load::<M>(params, params.v_after, self.head, row, self.chunk)
        };
        Row { words, factor: self.factor }
    }
}

/// A lane's part of a row.
#[derive(Clone, Copy)]
struct Row {
    /// Its 8 channels, two in a word.
    words: [u32; 4],
    /// The factor. It is 0 for invalid text and padding, which become zero.
    factor: f32,
}

/// Two channels of a lane's 8 keys.
#[derive(Clone, Copy)]
struct Pair {
    /// Of each channel, keys 0, 2, 4, 6 of the unit (or 1, 3, 5, 7), and then 8, 10, 12, 14 (or one
    /// more), each four in a word.
    keys: [[u32; 2]; 2],
    /// Of each channel, what rounding took from the sum of the keys.
    lost: [f32; 2],
}

impl Pair {
    /// Centres, scales and rounds the two channels that are in word `word` of each row. Of values up to
    /// `counted` it counts what rounding takes.
    #[inline(always)]
    fn new<E: Element>(rows: [Row; 8], word: usize, mean: [f32; 2], counted: f32) -> Pair {
        let values = rows.map(
            #[inline(always)]
            |row| {
                let [x, y] = E::unpack(row.words[word]);
                // What is infinite becomes no number, since e4m3 has no infinity.
                [math::fma(x - mean[0], row.factor, x * 0.0), math::fma(y - mean[1], row.factor, y * 0.0)]
            },
        );
        let [a, b, c, d, e, f, g, h] = values;
        let round = |channel: usize| {
            let (low, high) =
                ([a[channel], b[channel], c[channel], d[channel]], [e[channel], f[channel], g[channel], h[channel]]);
            let lost = |four: [f32; 4], rounded: u32| {
                let rounded = element::unpack_e4m3(rounded);
                let of = |i: usize| if four[i].abs() <= counted { four[i] - rounded[i] } else { 0.0 };
                (of(0) + of(1)) + (of(2) + of(3))
            };
            let keys = [element::pack_e4m3(low), element::pack_e4m3(high)];
            (keys, lost(low, keys[0]) + lost(high, keys[1]))
        };
        let (first, second) = (round(0), round(1));
        Pair { keys: [first.0, second.0], lost: [first.1, second.1] }
    }
}

/// Stores a channel of a unit at `place`. The lane with the even keys stores its channel `low`, and the
/// one with the odd keys its channel `high`. Each gets the other keys of its channel.
#[inline(always)]
unsafe fn store_channel(place: u64, odd: u32, low: [u32; 2], high: [u32; 2]) {
    let (mine, given) = if odd == 0 { (low, high) } else { (high, low) };
    let got = [warp::exchange(given[0], LANES), warp::exchange(given[1], LANES)];
    let (even, odd) = if odd == 0 { (mine, got) } else { (got, mine) };
    // Bytes of keys 0, 1, 8, 9, then 2, 3, 10, 11, and so on.
    let quad = |i: u32| {
        let pair = |word: usize| (even[word] >> (8 * i) & 0xff) | (odd[word] >> (8 * i) & 0xff) << 8;
        pair(0) | pair(1) << 16
    };
    global::store16(place, [quad(0), quad(1), quad(2), quad(3)]);
}
