//! V for attention in 8 bits: its centers, and its transposed images.

use crate::cuda::{copy, global, math, shared, thread, warp};
use crate::element::{self, Element};
use crate::model::{Model, valid_text};
use framestride_shapes::blocks::{
    CENTER_ROWS, CENTER_TEXT_ROWS, CENTER_THREADS, VALUES_ROW_BYTES, VALUES_STAGES, VALUES_THREADS, VALUES_UNITS,
};
use framestride_shapes::image::e4m3::{
    self, CENTER_COUNTED, CENTER_FACTOR, CENTER_FLOATS, CENTER_LOST, LOST_SCALE, UNIT_BYTES, UNIT_KEYS,
};
use framestride_shapes::layout::{HeadType, ValidText};
use framestride_shapes::params::{PackParams, Tensor};
use framestride_shapes::shared::{CenterShared, ValuesShared};

/// Lanes that share a row of a head. Each has 16 bytes of it, 8 channels.
const LANES: u32 = 16;

/// What lies where in the shared memory of **center**.
const CENTER_SHARED: CenterShared = CenterShared::new();

/// What lies where in the shared memory of **pack_values**.
const VALUES_SHARED: ValuesShared = ValuesShared::new();

/// **center**: the mean of each channel of V, and its size, over a sample of the video.
///
/// Weights of a row sum up to 1. So any vector may be subtracted from the values and added to the
/// output. This one leaves the least to be rounded to 8 bits. A block takes a head, and loads all
/// of its samples at once. Grid: x = batch x heads.
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
    let chunk = thread::index() % LANES;
    let mut sums = [0.0; 8];
    each_sample::<M>(
        params,
        head,
        #[inline(always)]
        |i, value| sums[i] += value,
    );
    let sums = sums.map(
        #[inline(always)]
        |sum| sum + warp::exchange(sum, LANES),
    );
    // Of the channels of a chunk, the first four lie 256 bytes before the others.
    let place = |row: u32, half: u32| row + half * 256 + chunk * 16;
    if thread::lane() < LANES {
        let row = shared::address(CENTER_SHARED.sums, thread::index() / 32);
        shared::store16(place(row, 0), [sums[0], sums[1], sums[2], sums[3]].map(f32::to_bits));
        shared::store16(place(row, 1), [sums[4], sums[5], sums[6], sums[7]].map(f32::to_bits));
    }
    thread::sync_block();
    if thread::index() < e4m3::ROW_BYTES {
        let channel = thread::index() * 4;
        let (mut sum, mut warp) = (0.0, 0);
        while warp < CENTER_THREADS / 32 {
            sum += shared::load_f32(shared::address(CENTER_SHARED.sums, warp) + channel);
            warp += 1;
        }
        shared::store_f32(shared::address(CENTER_SHARED.means, 0) + channel, sum * (1.0 / CENTER_ROWS as f32));
    }
    thread::sync_block();
    let means = shared::address(CENTER_SHARED.means, 0);
    let ([a, b, c, d], [e, f, g, h]) = (shared::load16(place(means, 0)), shared::load16(place(means, 1)));
    let means = [a, b, c, d, e, f, g, h].map(f32::from_bits);
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
/// Their root mean square is 4 to 8 then, or less where `most` would become more than 256. So
/// values that were not looked at may be 56 times as large before they are cut off.
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
/// Samples are video rows at equal distances. A thread has eight, whose loads are all in flight at
/// once.
#[inline(always)]
unsafe fn each_sample<M: Model>(params: &PackParams, head: u32, mut f: impl FnMut(usize, f32)) {
    const ROWS: u32 = CENTER_THREADS / LANES;
    const _: () = assert!(8 * ROWS == CENTER_ROWS);
    let (chunk, first) = (thread::index() % LANES, thread::index() / LANES);
    let load = |i: u32| {
        let video = ((first + i * ROWS) as u64 * M::layout().video_tokens() as u64 / CENTER_ROWS as u64) as u32;
        load::<M>(params, params.v, head, M::numbers().before_tokens + video, chunk)
    };
    // This is spelled out, since an array that a loop indexes would be in memory.
    let (s0, s1, s2, s3) = (load(0), load(1), load(2), load(3));
    let (s4, s5, s6, s7) = (load(4), load(5), load(6), load(7));
    each_finite::<M::Element>(s0, &mut f);
    each_finite::<M::Element>(s1, &mut f);
    each_finite::<M::Element>(s2, &mut f);
    each_finite::<M::Element>(s3, &mut f);
    each_finite::<M::Element>(s4, &mut f);
    each_finite::<M::Element>(s5, &mut f);
    each_finite::<M::Element>(s6, &mut f);
    each_finite::<M::Element>(s7, &mut f);
}

/// Calls `f` with each of a thread's sampled values of valid text, likewise. It has one sample.
#[inline(always)]
unsafe fn each_text_sample<M: Model>(params: &PackParams, head: u32, f: impl FnMut(usize, f32)) {
    const _: () = assert!(CENTER_THREADS / LANES == CENTER_TEXT_ROWS);
    let (chunk, sample) = (thread::index() % LANES, thread::index() / LANES);
    let valid = valid_text::<M>(params.before_lengths, params.after_lengths, head / params.heads);
    if valid.sum() == 0 {
        return;
    }
    // In the spatial layout, valid text comes first.
    let packed = (sample as u64 * valid.sum() as u64 / CENTER_TEXT_ROWS as u64) as u32;
    let row = M::layout().model_row(HeadType::Spatial, packed, valid);
    let tensor = if row < M::numbers().before_tokens { params.v_before } else { params.v_after };
    each_finite::<M::Element>(load::<M>(params, tensor, head, row, chunk), f);
}

/// Calls `f` with each of the 8 values of a chunk, and its number. One value that is not finite
/// would make the whole head so, and counts as zero.
#[inline(always)]
fn each_finite<E: Element>(chunk: [u32; 4], mut f: impl FnMut(usize, f32)) {
    let values = element::widen::<E>(chunk);
    let mut i = 0;
    while i < 8 {
        f(i, if values[i].abs() <= f32::MAX { values[i] } else { 0.0 });
        i += 1;
    }
}

/// Address of element `element` of a row of a head. `row` counts in the model's order, and `head`
/// over batch x heads.
#[inline(always)]
fn address<M: Model>(params: &PackParams, tensor: Tensor, head: u32, row: u32, element: u32) -> u64 {
    let (item, head) = (head / params.heads, head % params.heads);
    let element = item as u64 * tensor.batch + row as u64 * tensor.row + head as u64 * tensor.head + element as u64;
    tensor.data + element * M::Element::DTYPE.bytes() as u64
}

/// Chunk `chunk` of a row of a head, likewise.
#[inline(always)]
unsafe fn load<M: Model>(params: &PackParams, tensor: Tensor, head: u32, row: u32, chunk: u32) -> [u32; 4] {
    let address = address::<M>(params, tensor, head, row, chunk * 8);
    if params.aligned != 0 { global::load16(address) } else { global::load16_unaligned(address) }
}

/// **pack_values**: V without its mean, reordered and transposed ([`e4m3`]).
///
/// Each warp takes some units of 16 keys of a head. While it works on one, the rows of the next are
/// copied to shared memory. There each lane finds four channels of all keys. What it makes of them
/// goes back, so that neighbouring lanes store neighbouring bytes of the image.
///
/// Heads of the same keys are worked on near each other, since their rows lie beside each other in
/// memory. What rounding took from the mean of a channel is added up, and given back to the output.
/// Grid: x = heads x blocks of units, y = batch.
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
    let units = e4m3::bytes(layout.packed_rows()) / UNIT_BYTES;
    let mut unit = (block / params.heads * (VALUES_THREADS / 32) + thread::warp()) * VALUES_UNITS;
    let end = units.min(unit + VALUES_UNITS);
    if unit >= end {
        return;
    }
    let lane = thread::lane();
    let valid = valid_text::<M>(params.before_lengths, params.after_lengths, item);
    let source = Source {
        head,
        head_type: if params.head_types == 0 {
            HeadType::Spatial
        } else {
            HeadType::from_u32(global::load_u32(params.head_types + head as u64 * 4))
        },
        valid,
        live: valid.sum() + layout.video_tokens(),
    };
    let center = params.centers + (head * CENTER_FLOATS) as u64 * 4;
    let [factor, inverse] = global::load_f32x2(center + CENTER_FACTOR as u64 * 4);
    let counted = global::load_f32(center + CENTER_COUNTED as u64 * 4);
    let mean = global::load_f32x4(center + (lane * 16) as u64);
    let rounding = Rounding::new::<M::Element>(factor, inverse, counted, mean);
    let image = params.packed_v + head as u64 * M::image_bytes();
    let slot = |index: u32| shared::address(VALUES_SHARED.rows, thread::warp() * VALUES_STAGES + index % VALUES_STAGES);

    let mut lost = [0.0; 4];
    source.start::<M>(params, unit, slot(unit));
    copy::commit_group();
    while unit < end {
        if unit + 1 < end {
            source.start::<M>(params, unit + 1, slot(unit + 1));
        }
        copy::commit_group();
        copy::wait_groups::<1>();
        // Each lane reads what others have copied.
        warp::sync();
        let place = slot(unit) + lane * 8;
        // This is spelled out, since an array that a loop indexes would be in memory.
        let [a, b, c, d] = [load_four(place, 0), load_four(place, 2), load_four(place, 4), load_four(place, 6)];
        let usual = (rounding.usual(a) & rounding.usual(b)) & (rounding.usual(c) & rounding.usual(d));
        let keys = source.live.saturating_sub(unit * UNIT_KEYS);
        let [a, b, c, d] = if warp::any(keys < UNIT_KEYS || usual & 0x8000_8000 != 0x8000_8000) {
            let round = |four: FourKeys, key: u32| {
                let present = [key < keys, key + 1 < keys, key + 8 < keys, key + 9 < keys];
                rounding.round::<M::Element, false>(four, present)
            };
            [round(a, 0), round(b, 2), round(c, 4), round(d, 6)]
        } else {
            let round = |four: FourKeys| rounding.round::<M::Element, true>(four, [true; 4]);
            [round(a), round(b), round(c), round(d)]
        };
        let channel = |i: usize| [a.words[i], b.words[i], c.words[i], d.words[i]];
        let channels = [channel(0), channel(1), channel(2), channel(3)];
        let mut i = 0;
        while i < 4 {
            lost[i] += (a.lost[i] + b.lost[i]) + (c.lost[i] + d.lost[i]);
            i += 1;
        }
        // All lanes have read their rows.
        warp::sync();
        store_channels(slot(unit), image + (unit * UNIT_BYTES) as u64, lane, channels);
        // The slot is free for another unit.
        warp::sync();
        unit += 1;
    }
    // As fixed-point numbers, the sums do not depend on the order in which warps add to them.
    let sums = slot(0);
    let lost = lost.map(
        #[inline(always)]
        |lost| (lost * LOST_SCALE) as i32 as u32,
    );
    shared::store16(sums + lane * 16, lost);
    warp::sync();
    let mut i = 0;
    while i < 4 {
        let channel = i * 32 + lane;
        global::add_u32(center + (CENTER_LOST + channel) as u64 * 4, shared::load_u32(sums + channel * 4));
        i += 1;
    }
}

/// The rows of a head, in the order of its keys.
struct Source {
    head: u32,
    head_type: HeadType,
    valid: ValidText,
    /// Keys that are neither padding nor invalid text. They come first.
    live: u32,
}

impl Source {
    /// Address of the row of a key, or 0 where there is none.
    #[inline(always)]
    unsafe fn row<M: Model>(&self, params: &PackParams, key: u32) -> u64 {
        if key >= self.live {
            return 0;
        }
        let layout = M::layout();
        let row = layout.model_row(self.head_type, key, self.valid);
        let tensor = if row < layout.before {
            params.v_before
        } else if row < layout.before + layout.video_tokens() {
            params.v
        } else {
            params.v_after
        };
        address::<M>(params, tensor, self.head, row, 0)
    }

    /// Starts copies of the rows of a unit to `slot`. Where there is no key, the row becomes zero.
    ///
    /// Each lane knows where one row lies, since it may take divisions to find it.
    #[inline(always)]
    unsafe fn start<M: Model>(&self, params: &PackParams, unit: u32, slot: u32) {
        let lane = thread::lane();
        let own = self.row::<M>(params, unit * UNIT_KEYS + lane % UNIT_KEYS);
        let halves = [own as u32, (own >> 32) as u32];
        let mut i = 0;
        while i < UNIT_KEYS * LANES / 32 {
            let key = i * (32 / LANES) + lane / LANES;
            let [low, high] = halves.map(
                #[inline(always)]
                |half| warp::broadcast(half, key),
            );
            let (row, chunk) = (low as u64 | (high as u64) << 32, lane % LANES * 16);
            let (from, to) = (row + chunk as u64, slot + key * VALUES_ROW_BYTES + chunk);
            if row == 0 {
                shared::store16(to, [0; 4]);
            } else if params.aligned != 0 {
                copy::start16(to, from);
            } else {
                shared::store16(to, global::load16_unaligned(from));
            }
            i += 1;
        }
    }
}

/// A lane's four channels of four keys of a unit: two neighbours, and those that lie 8 keys
/// further. Their bytes lie beside each other in the image. A word has two channels.
type FourKeys = [[u32; 2]; 4];

/// Reads four keys, of which the first is number `key`. The lane's place in the first row is
/// `place`.
#[inline(always)]
unsafe fn load_four(place: u32, key: u32) -> FourKeys {
    let load = |key: u32| shared::load8(place + key * VALUES_ROW_BYTES);
    [load(key), load(key + 1), load(key + 8), load(key + 9)]
}

/// How a lane's channels are rounded.
struct Rounding {
    factor: f32,
    /// The mean of each channel, times minus the factor.
    offset: [f32; 4],
    /// The largest value, times the factor, of which is counted what rounding takes.
    counted: f32,
    /// 2^15 and the bits of an element that leaves every channel below `counted`, in both halves.
    /// Without such an element it is less than 2^15.
    limit: u32,
}

/// A lane's channels of four keys: a word of the image for each, and what rounding took from its
/// keys.
struct Rounded {
    words: [u32; 4],
    lost: [f32; 4],
}

impl Rounding {
    #[inline(always)]
    fn new<E: Element>(factor: f32, inverse: f32, counted: f32, mean: [f32; 4]) -> Rounding {
        let [a, b, c, d] = mean.map(
            #[inline(always)]
            |mean| mean.abs(),
        );
        let largest = counted * inverse - a.max(b).max(c.max(d));
        // Rounding may have made it larger, so the number before it is taken.
        let limit = if largest > 0.0 { 0x8000 + (E::pack(largest, 0.0) & 0x7fff).saturating_sub(1) } else { 0x7fff };
        let offset = mean.map(
            #[inline(always)]
            |mean| -(mean * factor),
        );
        Rounding { factor, offset, counted, limit: limit | limit << 16 }
    }

    /// A word whose bits 15 and 31 are set where all elements of four keys are finite, and what
    /// rounding takes from each is counted.
    #[inline(always)]
    fn usual(&self, four: FourKeys) -> u32 {
        // Bits of elements without their signs are in the order of the elements. Where one is
        // larger than the limit, the difference of its half has lost the upper bit.
        let fits = |word: u32| self.limit.wrapping_sub(word & 0x7fff_7fff);
        let [a, b, c, d] = four.map(
            #[inline(always)]
            |[low, high]| fits(low) & fits(high),
        );
        (a & b) & (c & d)
    }

    /// Centres, scales and rounds four keys. `USUAL` says that [`Rounding::usual`] holds, and that
    /// all keys are there; else `present` says which are.
    #[inline(always)]
    fn round<E: Element, const USUAL: bool>(&self, four: FourKeys, present: [bool; 4]) -> Rounded {
        let rows = four.map(
            #[inline(always)]
            |[low, high]| {
                let ([a, b], [c, d]) = (E::unpack(low), E::unpack(high));
                [a, b, c, d]
            },
        );
        let channel = |i: usize| {
            let value = |key: usize| {
                let x = rows[key][i];
                let y = math::fma(x, self.factor, self.offset[i]);
                if USUAL {
                    y
                } else if present[key] {
                    // What is infinite becomes no number, since e4m3 has no infinity.
                    math::fma(x, 0.0, y)
                } else {
                    0.0
                }
            };
            let four = [value(0), value(1), value(2), value(3)];
            let word = element::pack_e4m3(four);
            let rounded = element::unpack_e4m3(word);
            let lost = |key: usize| {
                if USUAL || four[key].abs() <= self.counted { four[key] - rounded[key] } else { 0.0 }
            };
            (word, (lost(0) + lost(1)) + (lost(2) + lost(3)))
        };
        let [a, b, c, d] = [channel(0), channel(1), channel(2), channel(3)];
        Rounded { words: [a.0, b.0, c.0, d.0], lost: [a.1, b.1, c.1, d.1] }
    }
}

/// Stores a unit at `place`. A lane has four channels next to each other. They are exchanged
/// through `slot`, so that neighbouring lanes store neighbouring channels.
#[inline(always)]
unsafe fn store_channels(slot: u32, place: u64, lane: u32, channels: [[u32; 4]; 4]) {
    // So both accesses to eight channels at a time reach all banks.
    let shuffled = |channel: u32| slot + (channel ^ (channel / 8 % 8)) * UNIT_KEYS;
    let [a, b, c, d] = channels;
    shared::store16(shuffled(lane * 4), a);
    shared::store16(shuffled(lane * 4 + 1), b);
    shared::store16(shuffled(lane * 4 + 2), c);
    shared::store16(shuffled(lane * 4 + 3), d);
    warp::sync();
    let mut i = 0;
    while i < 4 {
        let channel = i * 32 + lane;
        global::store16(place + (channel * UNIT_KEYS) as u64, shared::load16(shuffled(channel)));
        i += 1;
    }
}
