//! What the lanes of a warp do together: they meet, shuffle, vote, match, reduce and elect.

use super::{Wait, Warp, first, lanes, put, put_predicate};
use crate::alu::Lanes;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::*;

impl Warp {
    /// An aligned instruction, which all lanes of the warp execute together. Tells lanes that reach
    /// it without the others to wait for them.
    pub(crate) fn whole(&self, block: &mut Block, active: u32) -> Step<Option<Wait>> {
        let wait = self.aligned(active)?;
        if wait.is_none() {
            block.shared.clocks.meet(self.index, active);
        }
        Ok(wait)
    }

    /// Does what [`Warp::whole`] does, for an instruction that does not order what lanes did to
    /// memory.
    pub(crate) fn aligned(&self, active: u32) -> Step<Option<Wait>> {
        if active == u32::MAX {
            return Ok(None);
        }
        if self.live != u32::MAX || self.groups.len() == 1 {
            return Err(self.missing(u32::MAX, active));
        }
        Ok(Some(Wait::Lanes))
    }

    /// The fault that some lanes do not come.
    #[cold]
    pub(super) fn missing(&self, needed: u32, active: u32) -> Box<Trouble> {
        let missing = needed & !active;
        let lane = first(missing);
        let what = format!(
            "lanes {needed:#x} must execute it together, but only {active:#x} do; {missing:#x} {}",
            if missing & self.live == 0 { "have exited" } else { "go another way or are predicated off" }
        );
        Trouble::lane(FaultKind::Divergence, lane, what)
    }

    /// Checks that all lanes that the masks of the active lanes name are here. Tells to wait for
    /// others if they may still come.
    fn gather(&self, mask: R, active: u32) -> Step<Option<Wait>> {
        let masks = &self.r32[mask as usize];
        // In the usual case the warp is full, and every lane has the same full mask.
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

    /// Gathers the lanes that the masks name. When they have met, each knows what the others know.
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

    pub(super) fn vote(&mut self, vote: &Vote, active: u32) {
        let p = self.predicates[vote.p as usize] ^ if vote.negated { u32::MAX } else { 0 };
        for (group, mask) in by_mask(&self.r32[vote.mask as usize], active) {
            let (yes, group) = (p & mask, group & active);
            let all = |holds: bool| if holds { u32::MAX } else { 0 };
            let out = match vote.mode {
                VoteMode::Ballot => {
                    put(&mut self.r32[vote.d as usize], &[yes; 32], group);
                    continue;
                }
                VoteMode::All => all(yes == mask),
                VoteMode::Any => all(yes != 0),
                VoteMode::Uniform => all(yes == 0 || yes == mask),
            };
            put_predicate(&mut self.predicates[vote.d as usize], out, group);
        }
    }

    pub(super) fn match_lanes(&mut self, op: &Match, active: u32) {
        let value = |lane: usize| match op.wide {
            true => self.r64[op.a as usize][lane],
            false => self.r32[op.a as usize][lane] as u64,
        };
        let mut out = [0; 32];
        let mut holds = 0;
        for lane in lanes(active) {
            let mask = self.r32[op.mask as usize][lane];
            let same = lanes(mask).filter(|other| value(*other) == value(lane)).fold(0, |m, l| m | 1 << l);
            out[lane] = if !op.all || same == mask { same } else { 0 };
            holds |= u32::from(same == mask) << lane;
        }
        put(&mut self.r32[op.d as usize], &out, active);
        if let Some(p) = op.p {
            put_predicate(&mut self.predicates[p as usize], holds, active);
        }
    }

    pub(super) fn reduce(&mut self, op: ReduxOp, d: R, a: R, mask: R, active: u32) {
        for (group, mask) in by_mask(&self.r32[mask as usize], active) {
            let values = lanes(mask).map(|lane| self.r32[a as usize][lane]);
            let out = values.reduce(|x, y| match op {
                ReduxOp::Add => x.wrapping_add(y),
                ReduxOp::MinU => x.min(y),
                ReduxOp::MinS => (x as i32).min(y as i32) as u32,
                ReduxOp::MaxU => x.max(y),
                ReduxOp::MaxS => (x as i32).max(y as i32) as u32,
                ReduxOp::And => x & y,
                ReduxOp::Or => x | y,
                ReduxOp::Xor => x ^ y,
            });
            put(&mut self.r32[d as usize], &[out.unwrap_or(0); 32], group);
        }
    }

    pub(super) fn elect(&mut self, d: Option<R>, p: R, mask: R, active: u32) {
        for (group, mask) in by_mask(&self.r32[mask as usize], active) {
            let leader = first(mask);
            if let Some(d) = d {
                put(&mut self.r32[d as usize], &[leader as u32; 32], group);
            }
            put_predicate(&mut self.predicates[p as usize], 1 << leader, group);
        }
    }
}

/// The active lanes, grouped by the mask that they name: pairs of lanes and mask.
fn by_mask(masks: &Lanes<u32>, active: u32) -> Vec<(u32, u32)> {
    let mut out: Vec<(u32, u32)> = Vec::new();
    for lane in lanes(active) {
        match out.iter_mut().find(|(_, mask)| *mask == masks[lane]) {
            Some((group, _)) => *group |= 1 << lane,
            None => out.push((1 << lane, masks[lane])),
        }
    }
    out
}
