//! The producers of **profile**. They bring tiles, and say which of their keys each sample sees.

use core::ops::Range;

use super::{DENSE, KEY_ROWS, MASKS, Map, WARPS_OF_CANDIDATE, lost_masks, next_sweep, sampled_row};
use crate::cuda::barrier::{Barrier, Slot};
use crate::cuda::{copy, shared, thread, warp};
use crate::element::Element;
use crate::masks::band;
use crate::model::Model;
use framestride_shapes::params::ProfileParams;

/// A thread of the producer warpgroup.
///
/// The first thread keeps the stages full, and each works out which keys one sample sees through
/// one mask. The consumers would do that between two products, and with head dim 128 both of them
/// would.
pub struct Producer {
    lane: u32,
    /// Index of the thread's candidate mask.
    candidate: u32,
    /// The thread's sample, counted in the group.
    sample: u32,
    /// The sample's row of the video.
    video: u32,
    valid_text: u32,
    slot: Slot,
}

impl Producer {
    #[inline(always)]
    pub unsafe fn new<M: Model>(
        params: &ProfileParams,
        producer_warp: u32,
        [group, head]: [u32; 2],
        valid_text: u32,
    ) -> Producer {
        let lane = thread::lane();
        let candidate = producer_warp / WARPS_OF_CANDIDATE;
        let sample = producer_warp % WARPS_OF_CANDIDATE * 32 + lane;
        let video = sampled_row::<M>(params, head, group, sample);
        Producer { lane, candidate, sample, video, valid_text, slot: Slot::FIRST_FREE }
    }

    /// Brings the tiles for every sweep.
    #[inline(always)]
    pub unsafe fn run<M: Model>(mut self, params: &ProfileParams, head: u32, tiles: Range<u32>) {
        let (mut sweep, mut parity, mut lost) = (DENSE, 0, 0);
        while sweep != MASKS {
            let sees_any = self.bring::<M>(params, head, &tiles);
            Barrier::at(M::PROFILE_SHARED.swept, 0).wait(parity);
            parity ^= 1;
            if sweep == DENSE {
                let sum = shared::load_f32(Map::<M>::masked_sum(self.candidate, self.sample));
                // A sum that is no number is lost as well.
                let is_lost = warp::any(sees_any & !(sum >= M::Element::DTYPE.least_masked_sum()));
                if self.lane == 0 {
                    shared::store_u32(shared::address(M::PROFILE_SHARED.verdict, thread::index() / 32), is_lost as u32);
                }
                Barrier::at(M::PROFILE_SHARED.judged, 0).release(self.lane);
                lost = lost_masks::<M>();
            }
            // The consumers may have stored results where tiles come.
            shared::publish_to_async();
            sweep = next_sweep(sweep, lost);
        }
    }

    /// Brings the tiles once. Returns whether the thread's sample sees any of their keys.
    #[inline(always)]
    unsafe fn bring<M: Model>(&mut self, params: &ProfileParams, head: u32, tiles: &Range<u32>) -> bool {
        let head_bytes = M::IMAGE.bytes(M::layout().packed_rows()) as u64 * head as u64;
        let bytes = M::IMAGE.bytes(KEY_ROWS);
        let mut all_seen = 0;
        let mut tile = tiles.start;
        while tile < tiles.end {
            let (stage, rows) = (self.slot.stage, head_bytes + tile as u64 * bytes as u64);
            Barrier::at(M::PROFILE_SHARED.free, stage).wait(self.slot.parity);
            if thread::index() == 0 {
                Barrier::at(M::PROFILE_SHARED.key_full, stage).arrive_expecting(bytes);
                copy::to_shared(
                    shared::address(M::PROFILE_SHARED.key, stage),
                    params.packed_k + rows,
                    bytes,
                    Barrier::at(M::PROFILE_SHARED.key_full, stage),
                );
                Barrier::at(M::PROFILE_SHARED.value_full, stage).arrive_expecting(bytes);
                copy::to_shared(
                    shared::address(M::PROFILE_SHARED.value, stage),
                    params.packed_v + rows,
                    bytes,
                    Barrier::at(M::PROFILE_SHARED.value_full, stage),
                );
            }
            let first = tile * KEY_ROWS;
            let seen = band::sample_keys::<M>(params.half_widths(), self.candidate, self.video, self.valid_text, first);
            let place = Map::<M>::seen(stage, self.sample) + self.candidate * 8;
            shared::store_u32(place, seen as u32);
            shared::store_u32(place + 4, (seen >> 32) as u32);
            warp::sync();
            Barrier::at(M::PROFILE_SHARED.key_full, stage).release(self.lane);
            all_seen |= seen;
            self.slot = self.slot.next(Map::<M>::STAGES);
            tile += 1;
        }
        all_seen != 0
    }
}
