//! What lanes and warps do together: shuffles, named barriers, mbarriers, asynchronous copies, registers handed around.

use super::{Flow, Wait, Warp, first, lanes, put, put_predicate};
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::*;
use crate::race::By;
use crate::shared::misaligned;

impl Warp {
    /// An aligned instruction: lanes that meet it without the others of the warp wait for them.
    pub(super) fn whole(&self, block: &mut Block, active: u32) -> Step<Option<Wait>> {
        if active == u32::MAX {
            block.shared.clocks.meet(self.index, active);
            return Ok(None);
        }
        if self.live != u32::MAX || self.groups.len() == 1 {
            return Err(self.missing(u32::MAX, active));
        }
        Ok(Some(Wait::Lanes))
    }

    #[cold]
    fn missing(&self, needed: u32, active: u32) -> Box<Trouble> {
        let missing = needed & !active;
        let lane = first(missing);
        let what = format!(
            "lanes {needed:#x} must execute it together, but only {active:#x} do; {missing:#x} {}",
            if missing & self.live == 0 { "have exited" } else { "go another way or are predicated off" }
        );
        Trouble::lane(FaultKind::Divergence, lane, what)
    }

    /// Checks that all lanes named in the active lanes' masks are here; tells to wait if they may still come.
    fn gather(&self, mask: R, active: u32) -> Step<Option<Wait>> {
        let masks = &self.r32[mask as usize];
        // The usual case: a full warp, every lane with the same full mask.
        if active == u32::MAX && masks.iter().fold(u32::MAX, |all, mask| all & mask) == u32::MAX {
            return Ok(None);
        }
        for lane in lanes(active) {
            let mask = masks[lane];
            if mask >> lane & 1 == 0 {
                let what = format!("the mask {mask:#x} does not name the lane that executes it");
                return Err(Trouble::lane(FaultKind::Divergence, lane, what));
            }
            if mask & !active != 0 {
                if mask & !self.live != 0 || self.groups.len() == 1 {
                    return Err(self.missing(mask, active));
                }
                return Ok(Some(Wait::Lanes));
            }
            if let Some(other) = lanes(mask).find(|other| masks[*other] != mask) {
                let what = format!("the mask is {mask:#x} here and {:#x} in lane {other}", masks[other]);
                return Err(Trouble::lane(FaultKind::Divergence, lane, what));
            }
        }
        Ok(None)
    }

    /// [`Warp::gather`], after which each lane knows what the others do.
    pub(super) fn meet(&self, block: &mut Block, mask: R, active: u32) -> Step<Option<Wait>> {
        let wait = self.gather(mask, active)?;
        if wait.is_none() {
            block.shared.clocks.meet(self.index, active);
        }
        Ok(wait)
    }

    pub(super) fn shuffle(&mut self, shuffle: &Shuffle, active: u32) -> Step {
        let a = self.r32[shuffle.a as usize];
        let (b, c) = (&self.r32[shuffle.b as usize], &self.r32[shuffle.c as usize]);
        let masks = &self.r32[shuffle.mask as usize];
        let mut out = a;
        let mut in_range = 0;
        for lane in lanes(active) {
            let (by, segment, clamp) = ((b[lane] & 31) as i32, c[lane] >> 8 & 31, c[lane] & 31);
            let here = lane as i32;
            let low = (lane as u32 & segment) as i32;
            let limit = low | (clamp & !segment) as i32;
            let (source, inside) = match shuffle.mode {
                ShuffleMode::Up => (here - by, here - by >= limit),
                ShuffleMode::Down => (here + by, here + by <= limit),
                ShuffleMode::Butterfly => (here ^ by, here ^ by <= limit),
                ShuffleMode::Index => {
                    let source = low | (by as u32 & !segment) as i32;
                    (source, source <= limit)
                }
            };
            let source = if inside { source as usize } else { lane };
            if masks[lane] >> source & 1 == 0 {
                let what = format!("it reads lane {source}, which the mask {:#x} does not name", masks[lane]);
                return Err(Trouble::lane(FaultKind::Divergence, lane, what));
            }
            out[lane] = a[source];
            in_range |= u32::from(inside) << lane;
        }
        put(&mut self.r32[shuffle.d as usize], &out, active);
        if let Some(p) = shuffle.p {
            put_predicate(&mut self.predicates[p as usize], in_range, active);
        }
        Ok(())
    }

    pub(super) fn named_barrier(
        &mut self,
        block: &mut Block,
        barrier: &NamedBarrier,
        statement: u32,
        chosen: usize,
        active: u32,
    ) -> Step<Flow> {
        if let Some((id, round)) = self.groups[chosen].arrived {
            // Woken: the round is complete.
            if block.named[id as usize].round <= round {
                return Ok(Flow::Again(Wait::Named { id, round }));
            }
            self.groups[chosen].arrived = None;
            let (votes, voters) = block.named[id as usize].last_votes;
            let all = |holds: bool| if holds { u32::MAX } else { 0 };
            match barrier.kind {
                BarrierKind::Popc => put(&mut self.r32[barrier.d as usize], &[votes; 32], active),
                BarrierKind::And => {
                    put_predicate(&mut self.predicates[barrier.d as usize], all(votes == voters), active);
                }
                BarrierKind::Or => put_predicate(&mut self.predicates[barrier.d as usize], all(votes > 0), active),
                BarrierKind::Sync | BarrierKind::Arrive => {}
            }
            return Ok(Flow::Next);
        }
        if barrier.aligned && active != self.live {
            if self.groups.len() == 1 {
                return Err(self.missing(self.live, active));
            }
            return Ok(Flow::Again(Wait::Lanes));
        }
        let lane = first(active);
        let id = self.r32[barrier.id as usize][lane];
        let threads = barrier.count.map(|count| self.r32[count as usize][lane]);
        for other in lanes(active) {
            let same = self.r32[barrier.id as usize][other] == id
                && barrier.count.map(|count| self.r32[count as usize][other]) == threads;
            if !same {
                let what = "barrier number or thread count differs between lanes of the warp";
                return Err(Trouble::lane(FaultKind::Divergence, other, what));
            }
        }
        let p = self.predicates[barrier.p as usize] ^ if barrier.p_negated { u32::MAX } else { 0 };
        let arriving = if barrier.aligned { 32 } else { active.count_ones() };
        // Lanes that do not exist do not vote; an `and` must not fail for them.
        let absent = if barrier.aligned { 32 - active.count_ones() } else { 0 };
        let votes = (p & active).count_ones() + if barrier.kind == BarrierKind::And { absent } else { 0 };
        block.shared.clocks.meet(self.index, active);
        let waiting = if barrier.kind == BarrierKind::Arrive { 0 } else { active };
        let by = By { warp: self.index, lane: Some(lane), statement };
        let round = block.named_arrive(id, threads, arriving, votes, waiting, by)?;
        if barrier.kind == BarrierKind::Arrive {
            return Ok(Flow::Next);
        }
        self.groups[chosen].arrived = Some((id, round));
        Ok(Flow::Again(Wait::Named { id, round }))
    }

    /// Offset of an mbarrier object.
    fn mbarrier_offset(&self, block: &Block, space: Space, address: &Address, lane: usize) -> Step<usize> {
        let (found, address) = self.place(space, address, lane);
        if found != Space::Shared {
            let what = format!("an mbarrier at {address:#x}, which is not in shared memory");
            return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
        }
        block.shared.offset(address, 8, 8, lane)
    }

    pub(super) fn mbarrier(
        &mut self,
        block: &mut Block,
        mbarrier: &Mbarrier,
        statement: u32,
        chosen: usize,
        active: u32,
    ) -> Step<Flow> {
        if let MbarrierKind::Test { p, phase, blocking } = mbarrier.kind {
            return self.mbarrier_test(block, mbarrier, statement, p, phase, blocking, chosen, active);
        }
        for lane in lanes(active) {
            let by = By { warp: self.index, lane: Some(lane), statement };
            let offset = self.mbarrier_offset(block, mbarrier.space, &mbarrier.address, lane)?;
            let value = |r: R| self.r32[r as usize][lane];
            match &mbarrier.kind {
                MbarrierKind::Init { count } => block.mbarrier_init(offset, value(*count), by)?,
                MbarrierKind::Invalidate => block.mbarrier_invalidate(offset, by)?,
                MbarrierKind::ExpectTx { bytes } => block.expect_bytes(offset, value(*bytes) as i64, by)?,
                MbarrierKind::CompleteTx { bytes } => block.expect_bytes(offset, -(value(*bytes) as i64), by)?,
                MbarrierKind::Arrive { count, expect, drop, state } => {
                    let (count, expect) = (count.map_or(1, value), expect.map_or(0, value));
                    let phase = block.arrive(offset, count, expect, *drop, by)?;
                    if let Some(state) = state {
                        self.r64[*state as usize][lane] = phase;
                    }
                }
                MbarrierKind::Test { .. } => {}
            }
        }
        Ok(Flow::Next)
    }

    #[allow(clippy::too_many_arguments)]
    fn mbarrier_test(
        &mut self,
        block: &mut Block,
        mbarrier: &Mbarrier,
        statement: u32,
        p: R,
        phase: Phase,
        blocking: bool,
        chosen: usize,
        active: u32,
    ) -> Step<Flow> {
        let mut complete = 0;
        let mut wait = None;
        // Barriers, and the lanes that see their phase over.
        let mut passed: Vec<(usize, u32)> = Vec::new();
        for lane in lanes(active) {
            let offset = self.mbarrier_offset(block, mbarrier.space, &mbarrier.address, lane)?;
            let by = By { warp: self.index, lane: Some(lane), statement };
            let current = block.mbarrier(offset, by)?.phase;
            let (done, found) = match phase {
                Phase::Parity(r) => {
                    let parity = self.r32[r as usize][lane];
                    if parity > 1 {
                        let what = format!("parity {parity}: it must be 0 or 1");
                        return Err(Trouble::lane(FaultKind::Operand, lane, what));
                    }
                    (current & 1 != parity as u64, Wait::Mbarrier { offset, parity: Some(parity), phase: 0 })
                }
                Phase::State(r) => {
                    let phase = self.r64[r as usize][lane];
                    (current > phase, Wait::Mbarrier { offset, parity: None, phase })
                }
            };
            if done {
                complete |= 1 << lane;
                if passed.last().is_none_or(|(other, _)| *other != offset) {
                    passed.push((offset, 0));
                }
                passed.last_mut().expect("just seen").1 |= 1 << lane;
            } else {
                wait.get_or_insert(found);
            }
        }
        let timeout = std::mem::take(&mut self.groups[chosen].timeout);
        if let Some(wait) = wait
            && blocking
            && !timeout
        {
            return Ok(Flow::Again(wait));
        }
        passed.iter().for_each(|(offset, lanes)| block.pass(*offset, self.index, *lanes));
        put_predicate(&mut self.predicates[p as usize], complete, active);
        // A loop around a test that fails must not keep the others from running.
        Ok(if wait.is_some() { Flow::Pause } else { Flow::Next })
    }

    pub(super) fn bulk(&mut self, block: &mut Block, bulk: &Bulk, statement: u32, active: u32) -> Step {
        for lane in lanes(active) {
            let bytes = self.r32[bulk.bytes as usize][lane] as usize;
            let (_, shared) = self.place(Space::Shared, &bulk.shared, lane);
            let global = self.address(&bulk.global, lane);
            if !bytes.is_multiple_of(16) {
                let what = format!("a bulk copy of {bytes} bytes: it must be a multiple of 16");
                return Err(Trouble::lane(FaultKind::BulkCopy, lane, what));
            }
            let offset = block.shared.offset(shared, bytes, 16, lane)?;
            let Some((hint, _)) = block.global.find(global, bytes as u64, block.hint) else {
                let what =
                    format!("bulk copy of {bytes} bytes at global {global:#x}: {}", block.global.describe(global));
                return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
            };
            block.hint = hint;
            let by = By { warp: self.index, lane: Some(lane), statement };
            if !global.is_multiple_of(16) {
                return Err(misaligned(global, 16, lane, "global"));
            }
            match &bulk.barrier {
                Some(barrier) => {
                    let barrier = self.mbarrier_offset(block, Space::Shared, barrier, lane)?;
                    block.copy_in(offset, global, bytes, barrier, by)?;
                }
                None => block.copy_out(offset, global, bytes, by)?,
            }
        }
        Ok(())
    }

    pub(super) fn async_copy(&mut self, block: &mut Block, copy: &AsyncCopy, statement: u32, active: u32) -> Step {
        for lane in lanes(active) {
            let (_, shared) = self.place(Space::Shared, &copy.shared, lane);
            let offset = block.shared.offset(shared, copy.bytes, copy.bytes, lane)?;
            let global = self.address(&copy.global, lane);
            self.global(block, global, copy.bytes, lane, "asynchronous copy")?;
            block.start_async_copy(
                offset,
                global,
                copy.bytes,
                By { warp: self.index, lane: Some(lane), statement },
                lane,
            )?;
        }
        Ok(())
    }

    pub(super) fn set_max_registers(&mut self, block: &mut Block, count: u32, increase: bool) -> Step<Flow> {
        let Some(free) = block.free_registers else {
            let what = "setmaxnreg in a kernel without .maxntid or .reqntid: ptxas drops it (C7508)";
            return Err(Trouble::new(FaultKind::Operand, what));
        };
        let held = self.registers;
        if (increase && count < held) || (!increase && count > held) {
            let what =
                format!("{count} registers, from {held}: not a{}", if increase { "n increase" } else { " decrease" });
            return Err(Trouble::new(FaultKind::Operand, what));
        }
        if increase && free < count - held {
            return Ok(Flow::Again(Wait::Registers(count - held)));
        }
        block.free_registers = Some(free + held - count);
        self.registers = count;
        block.progress += 1;
        Ok(Flow::Next)
    }
}
