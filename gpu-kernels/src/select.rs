//! **select** merges the splits of [`profile`](crate::profile), compares each candidate's output
//! with the dense one, and names the type of each head. Grid: z = batch x heads.

use crate::cuda::{global, math, shared, thread, warp};
use crate::masks::{CANDIDATES, each_candidate};
use crate::model::Model;
use framestride_shapes::blocks::{SAMPLE_ROWS, SELECT_THREADS};
use framestride_shapes::layout::HeadType;
use framestride_shapes::params::{PartialsLayout, SelectParams};

/// Numbers of the masks whose partial results **select** merges, as [`HeadType`] has them: dense, then
/// the candidates.
const MASKS: [u32; 1 + CANDIDATES] = {
    let mut masks = [HeadType::Dense as u32; 1 + CANDIDATES];
    let mut candidate = 0;
    while candidate < CANDIDATES {
        masks[1 + candidate] = HeadType::CANDIDATES[candidate] as u32;
        candidate += 1;
    }
    masks
};

/// The body of **select**. A warp has one sample at a time, and in the end one thread decides for
/// the head.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, after **profile** on the
/// same stream.
#[inline(always)]
pub unsafe fn select<M: Model>(params: &SelectParams) {
    let head = thread::block_z();
    let lane = thread::lane();
    let mut errors = [0.0f32; CANDIDATES];
    let mut row = thread::warp();
    while row < M::numbers().profile_rows.value {
        let sample = Sample::of::<M>(params.partials, params.splits, head, row, MASKS);
        let mut column = lane * 2;
        // The first outputs are on their way while the factors are computed.
        let mut values = sample.values::<M>(column, 0);
        let factors = sample.factors(lane);
        while column < M::HEAD_DIM {
            if column >= 64 {
                values = sample.values::<M>(column, 0);
            }
            let [dense, masked @ ..] = sample.merge::<M>(column, values, factors);
            each_candidate(
                #[inline(always)]
                |mask| {
                    let distance = [masked[mask][0] - dense[0], masked[mask][1] - dense[1]];
                    let error = math::fma(distance[1], distance[1], errors[mask]);
                    errors[mask] = math::fma(distance[0], distance[0], error);
                },
            );
            column += 64;
        }
        row += SELECT_THREADS / 32;
    }
    if let Some(total) = block_sums::<M, CANDIDATES>(errors) {
        let mean = total.map(|error| error * M::numbers().error_mean);
        let (mut least, mut chosen) = (mean[0], HeadType::CANDIDATES[0]);
        each_candidate(
            #[inline(always)]
            |mask| {
                global::store_f32(params.errors + (head as usize * CANDIDATES + mask) as u64 * 4, mean[mask]);
                if mean[mask] < least {
                    (least, chosen) = (mean[mask], HeadType::CANDIDATES[mask]);
                }
            },
        );
        global::store_u32(params.head_types + head as u64 * 4, chosen as u32);
    }
}

/// The sums of the values of all threads of a block of [`SELECT_THREADS`]. Its first thread gets them.
///
/// # Safety
/// All threads come here.
#[inline(always)]
pub(crate) unsafe fn block_sums<M: Model, const N: usize>(values: [f32; N]) -> Option<[f32; N]> {
    const { assert!(N <= CANDIDATES, "the map has room for a value for each candidate") };
    let values = values.map(
        #[inline(always)]
        |value| warp::sum::<32>(value),
    );
    let own_warp = thread::warp();
    let place = |warp: u32, i: usize| shared::address(M::SELECT_SHARED.sums, warp) + 4 * i as u32;
    if thread::lane() == 0 {
        let mut i = 0;
        while i < N {
            shared::store_f32(place(own_warp, i), values[i]);
            i += 1;
        }
    }
    thread::sync_block();
    if thread::index() != 0 {
        return None;
    }
    let mut total = [0.0f32; N];
    let mut other = 0;
    while other < SELECT_THREADS / 32 {
        let mut i = 0;
        while i < N {
            total[i] += shared::load_f32(place(other, i));
            i += 1;
        }
        other += 1;
    }
    Some(total)
}

/// What `add` makes of the values of all lanes. There is a value for each mask, so that their
/// exchanges overlap.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
unsafe fn reduce<const N: usize>(mut values: [f32; N], add: impl Fn(f32, f32) -> f32) -> [f32; N] {
    let mut distance = 16;
    while distance > 0 {
        values = values.map(
            #[inline(always)]
            |value| add(value, warp::exchange(value, distance)),
        );
        distance /= 2;
    }
    values
}

/// The results of one sample in all splits, under some masks. Arrays over masks are in the order of
/// `masks`.
pub(crate) struct Sample<const N: usize> {
    /// Address of the first f32 of the first split.
    partials: u64,
    plan: PartialsLayout,
    /// The sample, counted in its group.
    sample: u32,
    /// Numbers of the masks.
    masks: [u32; N],
}

/// Splits whose outputs are loaded together.
const SPLITS_AT_ONCE: usize = 2;

/// Columns `column` and `column + 1` of the outputs of some splits, under each mask.
type Values<const N: usize> = [[[f32; 2]; N]; SPLITS_AT_ONCE];

impl<const N: usize> Sample<N> {
    /// The indices of arrays over masks.
    const ALL: [usize; N] = {
        let mut all = [0; N];
        let mut mask = 0;
        while mask < N {
            all[mask] = mask;
            mask += 1;
        }
        all
    };

    /// The sample `row` of a head, among the partial results at `partials`.
    #[inline(always)]
    pub(crate) fn of<M: Model>(partials: u64, splits: u32, head: u32, row: u32, masks: [u32; N]) -> Sample<N> {
        let plan = M::partials(splits);
        let partials = partials + plan.offset(head, row / SAMPLE_ROWS, 0) * 4;
        Sample { partials, plan, sample: row % SAMPLE_ROWS, masks }
    }

    /// The factors by which the outputs of a split are multiplied under each mask. It is the split
    /// with the lane's number. A split that has nothing to add has a factor of 0.
    #[inline(always)]
    pub(crate) unsafe fn factors(&self, lane: u32) -> [f32; N] {
        let own = |index: u32| self.partials + (lane * self.plan.split_floats() + index + self.sample) as u64 * 4;
        let (mut offsets, mut sums) = ([0.0; N], [0.0; N]);
        if lane < self.plan.splits {
            let load = |mask: u32, index: u32| global::load_f32(own(self.plan.mask_offset(mask) + index));
            offsets = self.masks.map(
                #[inline(always)]
                |mask| load(mask, 0),
            );
            sums = self.masks.map(
                #[inline(always)]
                |mask| load(mask, SAMPLE_ROWS),
            );
        }
        // A sum below the normal numbers is 0: no key of the split is visible.
        let has_any = sums.map(|sum| sum >= f32::MIN_POSITIVE);
        let log_sums = Self::ALL.map(
            #[inline(always)]
            |mask| if has_any[mask] { offsets[mask] + math::log2(sums[mask]) } else { f32::NEG_INFINITY },
        );
        // Some split has a visible key, unless all is NaN. What is subtracted must be a number then
        // too.
        let largest = reduce(log_sums, f32::max).map(|largest| largest.max(f32::MIN));
        let shares = Self::ALL.map(
            #[inline(always)]
            |mask| math::exp2(log_sums[mask] - largest[mask]),
        );
        let totals = reduce(shares, |sum, share| sum + share);
        Self::ALL.map(
            #[inline(always)]
            |mask| {
                // A division in full precision would be a call.
                let factor = shares[mask] * math::reciprocal(totals[mask]) * math::reciprocal(sums[mask]);
                if has_any[mask] { factor } else { 0.0 }
            },
        )
    }

    /// Loads the [`Values`] of splits from `first` on. Behind the last split, its values come
    /// again.
    #[inline(always)]
    pub(crate) unsafe fn values<M: Model>(&self, column: u32, first: u32) -> Values<N> {
        let mut values = [[[0.0f32; 2]; N]; SPLITS_AT_ONCE];
        let mut i = 0;
        while i < SPLITS_AT_ONCE {
            let split = (first + i as u32).min(self.plan.splits - 1) * self.plan.split_floats();
            let own = self.sample * M::HEAD_DIM + column;
            let load = |mask: u32| {
                let place = split + self.plan.mask_offset(mask) + 2 * SAMPLE_ROWS + own;
                global::load_f32x2(self.partials + place as u64 * 4)
            };
            values[i] = self.masks.map(load);
            i += 1;
        }
        values
    }

    /// Columns `column` and `column + 1` of the output under each mask.
    ///
    /// `values` are those of the first splits, and `factors` what [`Sample::factors`] gave each
    /// lane. They are 0 in lanes without a split, so that repeated values add nothing.
    #[inline(always)]
    pub(crate) unsafe fn merge<M: Model>(
        &self,
        column: u32,
        mut values: Values<N>,
        factors: [f32; N],
    ) -> [[f32; 2]; N] {
        let mut outputs = [[0.0f32; 2]; N];
        let mut first = 0;
        loop {
            let mut i = 0;
            while i < SPLITS_AT_ONCE {
                let factors = Self::ALL.map(
                    #[inline(always)]
                    |mask| warp::broadcast(factors[mask], first + i as u32),
                );
                let add =
                    |mask: usize, half: usize| math::fma(factors[mask], values[i][mask][half], outputs[mask][half]);
                outputs = Self::ALL.map(
                    #[inline(always)]
                    |mask| [add(mask, 0), add(mask, 1)],
                );
                i += 1;
            }
            first += SPLITS_AT_ONCE as u32;
            if first >= self.plan.splits {
                return outputs;
            }
            values = self.values::<M>(column, first);
        }
    }
}
