//! The 16 named barriers of a block, for whole warps (`bar`) or any threads (`barrier`).

use super::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::race::{By, Clock, Marks};

/// The state of a named barrier. It is used in rounds: a round is complete when all its threads
/// came.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamedBarrier {
    /// How many threads have arrived in the current round.
    pub arrived: u32,
    /// How many threads take part in the current round.
    pub threads: u32,
    /// How many rounds are complete.
    pub round: u64,
    /// How many threads of the current round have a predicate that holds, of how many that voted.
    votes: (u32, u32),
    /// The votes of the last complete round, in the same form.
    pub last_votes: (u32, u32),
    /// What the arrivals of the current round know.
    arriving: Clock,
    /// The last arrival of each warp in the current round, and in the round before.
    arrivals: Marks,
    last_arrivals: Marks,
    /// The warps that wait for the current round, each with the lanes that do.
    waiting: Vec<(usize, u32)>,
}

impl Block<'_> {
    /// A warp arrives with `arriving` threads, of which `votes` have a predicate that holds. Its
    /// lanes in `waiting` wait. Returns the round to wait for.
    pub fn named_arrive(
        &mut self,
        id: u32,
        threads: Option<u32>,
        arriving: u32,
        votes: u32,
        waiting: u32,
        by: By,
    ) -> Step<u64> {
        let all = self.threads.next_multiple_of(32);
        let clocks = &mut self.shared.clocks;
        let Some(barrier) = self.named.get_mut(id as usize) else {
            return Err(Trouble::new(FaultKind::Barrier, format!("named barrier {id}: a block has 0 to 15")));
        };
        let threads = threads.unwrap_or(all);
        if threads == 0 || !threads.is_multiple_of(32) || threads > all {
            let what = format!("named barrier {id} for {threads} threads: a multiple of 32 up to {all} is allowed");
            return Err(Trouble::new(FaultKind::Barrier, what));
        }
        if barrier.arrived > 0 && barrier.threads != threads {
            let what =
                format!("named barrier {id} is for {threads} threads here, and for {} elsewhere", barrier.threads);
            return Err(Trouble::new(FaultKind::Barrier, what));
        }
        barrier.threads = threads;
        barrier.arrived += arriving;
        barrier.votes.0 += votes;
        barrier.votes.1 += arriving;
        if barrier.arrived > threads {
            let what = format!("{} threads arrived at named barrier {id} of {threads}", barrier.arrived);
            return Err(Trouble::new(FaultKind::Barrier, what));
        }
        if let Some(other) = barrier.last_arrivals.unknown(clocks, by) {
            let what = format!(
                "an arrival at named barrier {id} that could have come in the round before: it is not ordered after the \
                 arrival there by"
            );
            return Err(Trouble::new(FaultKind::Barrier, what).other(other));
        }
        barrier.arrivals.set(clocks, by);
        clocks.release(by, &mut barrier.arriving);
        if waiting != 0 {
            barrier.waiting.push((by.warp, waiting));
        }
        let round = barrier.round;
        if barrier.arrived == threads {
            for (warp, lanes) in barrier.waiting.drain(..) {
                clocks.acquire(warp, lanes, &barrier.arriving);
            }
            barrier.arriving.clear();
            barrier.last_arrivals = std::mem::take(&mut barrier.arrivals);
            barrier.arrived = 0;
            barrier.round += 1;
            barrier.last_votes = std::mem::take(&mut barrier.votes);
            self.preempt = self.hands_over;
        }
        self.progress += 1;
        Ok(round)
    }
}
