//! Named barriers, mbarriers, and registers that warps hand to each other.

use super::{Flow, Wait, Warp, first, lanes, put, put_predicate};
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::*;
use crate::race::By;

impl Warp {
    pub(super) fn named_barrier(
        &mut self,
        block: &mut Block,
        barrier: &NamedBarrier,
        statement: u32,
        chosen: usize,
        active: u32,
    ) -> Step<Flow> {
        if let Some((id, round)) = self.groups[chosen].arrived {
            // The group has arrived before, and was woken to look whether the round is complete.
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
        // Lanes that do not exist do not vote. An `and` must not fail because of them.
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

    /// The offset of an mbarrier in shared memory.
    pub(super) fn mbarrier_offset(&self, block: &Block, space: Space, address: &Address, lane: usize) -> Step<usize> {
        let (found, address) = self.resolve(space, address, lane);
        if found != Space::Shared {
            let what = format!("an mbarrier at {address:#x}, which is not in shared memory");
            return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
        }
        block.shared.offset(address, 8, 8, lane)
    }

    pub(super) fn mbarrier(
        &mut self,
        block: &mut Block,
        mbarrier: &MbarrierUse,
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

    /// `test_wait` and `try_wait`. A `blocking` one waits until the phases of all lanes are
    /// complete.
    #[allow(clippy::too_many_arguments)]
    fn mbarrier_test(
        &mut self,
        block: &mut Block,
        mbarrier: &MbarrierUse,
        statement: u32,
        p: R,
        phase: Phase,
        blocking: bool,
        chosen: usize,
        active: u32,
    ) -> Step<Flow> {
        let mut complete = 0;
        let mut wait = None;
        // Each mbarrier with the lanes that see its phase complete.
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
        // Other warps run first, because a loop around a test that fails would keep them from
        // running.
        Ok(if wait.is_some() { Flow::Pause } else { Flow::Next })
    }

    /// `setmaxnreg`: gives registers back, or waits until there are enough.
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
