//! What the threads of a consumer warpgroup find: outputs and sums, for all keys and under each
//! candidate mask.

use super::{COLUMNS, SAMPLE_ROWS};
use crate::cuda::mma::{Descriptor, Fragment, Products, TileProducts};
use crate::cuda::{global, math, shared, thread, warp};
use crate::masks::{CANDIDATES, each_candidate};
use crate::model::{Hopper, Model};
use crate::softmax::{self, Rows};
use framestride_shapes::fragment::{self, row_of, thread_keys};

/// What a thread has found for its two samples in a sweep.
///
/// A sweep goes over all keys, or (where `MASKED` says so in what follows) over those that one mask
/// shows. The latter has no other output than `all`, and no other sums than those of `rows`.
pub struct Results<M: Model> {
    /// Offsets and sums of weights, of the sweep's keys.
    pub rows: Rows,
    /// The output of the sweep's keys, which is not normalised.
    pub all: <M::Profile as Products>::Output,
    /// The sums of weights under each candidate mask.
    pub sums: [[f32; 2]; CANDIDATES],
    /// The outputs of the keys that each candidate mask shows.
    pub masked: [<M::Profile as Products>::Output; CANDIDATES],
}

/// The rounded weights of a tile: those of all keys, and those that each candidate mask keeps.
pub struct Weights<M: Model> {
    all: <M::Profile as Products>::Weights,
    masked: [<M::Profile as Products>::Weights; CANDIDATES],
}

impl<M: Model> Results<M> {
    /// Those of no keys.
    #[inline(always)]
    pub fn new() -> Results<M> {
        Results {
            rows: Rows::new(),
            all: <M::Profile as Products>::Output::splat(0.0),
            sums: [[0.0; 2]; CANDIDATES],
            masked: [<M::Profile as Products>::Output::splat(0.0); CANDIDATES],
        }
    }

    /// Lowers the offsets for a tile of scores, and turns these into weights ([`Rows::lower`]).
    #[inline(always)]
    pub unsafe fn lower<const MASKED: bool>(&mut self, scores: &mut <M::Profile as Products>::Scores) {
        let rescale = self.rows.lower::<M::Element>(scores);
        softmax::scale_rows(&mut self.all, rescale);
        if !MASKED {
            each_candidate(
                #[inline(always)]
                |mask| softmax::scale_rows(&mut self.masked[mask], rescale),
            );
            self.sums = self.sums.map(|sum| [sum[0] * rescale[0], sum[1] * rescale[1]]);
        }
    }

    /// Rounds the weights of a tile for each output. Adds those that each candidate mask keeps to
    /// its sums. `seen` says which keys the samples see through it.
    #[inline(always)]
    pub unsafe fn weights<const MASKED: bool>(
        &mut self,
        all: &<M::Profile as Products>::Scores,
        seen: [[u64; 2]; CANDIDATES],
        lane: u32,
    ) -> Weights<M> {
        let rounded = M::Profile::weights(all);
        let mut weights = Weights { all: rounded, masked: [rounded; CANDIDATES] };
        if !MASKED {
            each_candidate(
                #[inline(always)]
                |mask| {
                    let sum = &mut self.sums[mask];
                    weights.masked[mask] = keep_seen::<M>(all, &rounded, self.rows.tile_sum, seen[mask], lane, sum);
                },
            );
        }
        weights
    }
}

impl<M: Hopper> Results<M> {
    /// Starts the products with V, a group for each output.
    #[inline(always)]
    pub unsafe fn start_outputs<const MASKED: bool>(&mut self, weights: &Weights<M>, value: Descriptor) {
        M::Profile::start_output(&mut self.all, &weights.all, value);
        if !MASKED {
            each_candidate(
                #[inline(always)]
                |mask| M::Profile::start_output(&mut self.masked[mask], &weights.masked[mask], value),
            );
        }
    }

    /// Waits for all products.
    #[inline(always)]
    pub unsafe fn wait_outputs<const MASKED: bool>(&mut self, weights: &mut Weights<M>) {
        M::Profile::wait_output(&mut self.all, &mut weights.all);
        if !MASKED {
            each_candidate(
                #[inline(always)]
                |mask| M::Profile::wait_output(&mut self.masked[mask], &mut weights.masked[mask]),
            );
        }
    }

    /// Gives the first warpgroup the results of both. They have had different tiles, and so they
    /// have different offsets.
    #[inline(always)]
    pub unsafe fn merge_turns<const MASKED: bool>(&mut self, warpgroup: u32) {
        const PER_OUTPUT: u32 = COLUMNS / 2;
        // Tiles were there. A value of one thread lies beside that of the next.
        let place = |index: u32| shared::address(M::PROFILE_SHARED.key, 0) + (index * 128 + thread::index() % 128) * 4;
        let place_of_sum = |mask: usize, row: u32| place(4 + 2 * mask as u32 + row);
        let all_values = 4 + 2 * CANDIDATES as u32;
        let values_of = |mask: usize| all_values + (1 + mask as u32) * PER_OUTPUT;
        let Results { rows, all, sums, masked } = self;
        // Both must be done with the tiles.
        thread::sync_two_warpgroups();
        if warpgroup == 1 {
            let mut row = 0;
            while row < 2 {
                shared::store_f32(place(row), rows.offset[row as usize]);
                shared::store_f32(place(2 + row), rows.sum[row as usize]);
                each_candidate(
                    #[inline(always)]
                    |mask| shared::store_f32(place_of_sum(mask, row), sums[mask][row as usize]),
                );
                row += 1;
            }
            all.for_each(
                #[inline(always)]
                |i, value| shared::store_f32(place(all_values + i), *value),
            );
            if !MASKED {
                each_candidate(
                    #[inline(always)]
                    |mask| {
                        masked[mask].for_each(
                            #[inline(always)]
                            |i, value| shared::store_f32(place(values_of(mask) + i), *value),
                        )
                    },
                );
            }
        }
        thread::sync_two_warpgroups();
        if warpgroup == 0 {
            let offset = [0, 1].map(|row| rows.offset[row as usize].min(shared::load_f32(place(row))));
            let own = [0, 1].map(|row| math::exp2(offset[row] - rows.offset[row]));
            let other = [0, 1].map(|row| math::exp2(offset[row as usize] - shared::load_f32(place(row))));
            let add = |value: f32, row: usize, index: u32| {
                math::fma(value, own[row], shared::load_f32(place(index)) * other[row])
            };
            rows.offset = offset;
            rows.sum = [0, 1].map(|row| add(rows.sum[row], row, 2 + row as u32));
            each_candidate(
                #[inline(always)]
                |mask| sums[mask] = [0, 1].map(|row| add(sums[mask][row], row, 4 + 2 * mask as u32 + row as u32)),
            );
            all.for_each(
                #[inline(always)]
                |i, value| *value = add(*value, row_of(i), all_values + i),
            );
            if !MASKED {
                each_candidate(
                    #[inline(always)]
                    |mask| {
                        masked[mask].for_each(
                            #[inline(always)]
                            |i, value| *value = add(*value, row_of(i), values_of(mask) + i),
                        )
                    },
                );
            }
        }
    }
}

/// The rounded weights of `seen` keys. Adds them to `sum`.
///
/// `dense` are the weights of all keys, `all` are the same rounded, and `tile_sum` are their sums.
#[inline(always)]
unsafe fn keep_seen<M: Model>(
    dense: &<M::Profile as Products>::Scores,
    all: &<M::Profile as Products>::Weights,
    tile_sum: [f32; 2],
    seen: [u64; 2],
    lane: u32,
    sum: &mut [f32; 2],
) -> <M::Profile as Products>::Weights {
    let is_whole = |keys: u64| keys == 0 || keys == u64::MAX;
    if warp::any(!(is_whole(seen[0]) & is_whole(seen[1]))) {
        let mut masked = *dense;
        let own = seen.map(|keys| thread_keys(keys, lane));
        softmax::replace_unseen(&mut masked, own, 0.0);
        masked.for_each(
            #[inline(always)]
            |i, weight| sum[row_of(i)] += *weight,
        );
        M::Profile::weights(&masked)
    } else {
        // Most tiles are wholly inside or outside of what a row sees.
        *sum = [0, 1].map(|row| if seen[row] != 0 { sum[row] + tile_sum[row] } else { sum[row] });
        M::Profile::and_rows(all, seen.map(|keys| if keys != 0 { u32::MAX } else { 0 }))
    }
}

/// Where a thread's results belong: its two samples, their offsets, and the columns from
/// `first_column` on.
pub struct Store {
    pub samples: [u32; 2],
    pub offset: [f32; 2],
    pub lane: u32,
    pub first_column: u32,
}

impl Store {
    /// Writes offsets, sums and the output under one mask. `place` is where those of the mask
    /// begin.
    #[inline(always)]
    pub unsafe fn mask<M: Model>(&self, place: u64, sums: [f32; 2], output: &mut impl Fragment) {
        let Store { samples, offset, lane, first_column } = *self;
        if lane % 4 == 0 && first_column == 0 {
            let mut row = 0;
            while row < 2 {
                global::store_f32(place + samples[row] as u64 * 4, -offset[row]);
                global::store_f32(place + (SAMPLE_ROWS + samples[row]) as u64 * 4, sums[row]);
                row += 1;
            }
        }
        let column = first_column + fragment::first_column(lane);
        output.for_each_group(
            #[inline(always)]
            |group, [a, b, c, d]| {
                let row =
                    |row: usize| place + (2 * SAMPLE_ROWS + samples[row] * M::HEAD_DIM + group * 8 + column) as u64 * 4;
                global::store_f32x2(row(0), [*a, *b]);
                global::store_f32x2(row(1), [*c, *d]);
            },
        );
    }
}
