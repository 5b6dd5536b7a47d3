//! Happens-before in a block: who knows of which access to shared memory.
//!
//! Each warp has a vector clock (Lamport, Mattern), and each access carries the warp's own time, as in FastTrack (Flanagan and Freund
//! 2009). An access is ordered before another when the clock of the other's warp has come to its time. Clocks travel as barriers
//! let them: an arrival leaves the clock of its warp, whoever waits takes all that arrivals left.
//!
//! Two more kinds of time are kept in the same clocks. That of an mbarrier are its phases: a bulk copy is ordered before those who know
//! that the phase it counts in is over. That of a warp's proxy fences: an ordinary store is visible to the asynchronous proxy for
//! those who know a fence after it.

use crate::fault::{FaultKind, Step, Trouble};
use crate::shared;
use std::collections::HashMap;

/// What is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    /// Times by index: of each warp the time up to which it is known, the time up to which its stores are fenced, and the time up to
    /// which some lanes are known; then the phases of mbarriers.
    times: Vec<u32>,
    /// Those lanes, by warp.
    lanes: Vec<u32>,
}

impl Clock {
    /// That of `warps` warps and no mbarrier, which knows nothing.
    fn new(warps: usize) -> Clock {
        Clock { times: vec![0; 3 * warps], lanes: vec![0; warps] }
    }

    /// Knows what another does, too.
    fn join(&mut self, other: &Clock) {
        self.times.resize(self.times.len().max(other.times.len()), 0);
        self.lanes.resize(self.lanes.len().max(other.lanes.len()), 0);
        self.times.iter_mut().zip(&other.times).for_each(|(time, other)| *time = (*time).max(*other));
        self.lanes.iter_mut().zip(&other.lanes).for_each(|(lanes, other)| *lanes |= other);
    }

    /// Knows an mbarrier's phases, too.
    pub fn set_phases(&mut self, whose: usize, time: u32) {
        self.times.resize(self.times.len().max(whose + 1), 0);
        self.times[whose] = time;
    }

    pub fn clear(&mut self) {
        self.times.clear();
        self.lanes.clear();
    }
}

/// Who does something, and where; no lane where the whole warp does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct By {
    pub warp: usize,
    pub lane: Option<usize>,
    pub statement: u32,
}

/// What some lanes of a warp know.
struct Known {
    lanes: u32,
    clock: Clock,
}

/// The clocks of a block's warps.
pub(crate) struct Clocks {
    /// Own time of each warp, one for all lanes, and when they last met.
    now: Vec<u32>,
    met: Vec<u32>,
    /// What the lanes of each warp know of others: of one mind, until some wait for a barrier without the rest.
    known: Vec<Vec<Known>>,
    /// Index of each mbarrier that ever was, by offset, and phases completed before it was last initialised.
    mbarriers: HashMap<usize, (usize, u32)>,
}

impl Clocks {
    pub fn new(warps: usize) -> Clocks {
        let known = (0..warps).map(|_| Vec::new()).collect();
        Clocks { now: vec![0; warps], met: vec![0; warps], known, mbarriers: HashMap::new() }
    }

    /// As new, for the next block.
    pub fn reset(&mut self) {
        let warps = self.now.len();
        self.mbarriers.clear();
        // Time 0 is before everything.
        self.now.fill(1);
        self.met.fill(0);
        for known in &mut self.known {
            known.clear();
            known.push(Known { lanes: u32::MAX, clock: Clock::new(warps) });
        }
    }

    #[inline]
    fn clock(&self, by: By) -> &Clock {
        match &self.known[by.warp][..] {
            [known] => &known.clock,
            all => {
                let lane = by.lane.unwrap_or(0);
                &all.iter().find(|known| known.lanes >> lane & 1 == 1).expect("every lane is somewhere").clock
            }
        }
    }

    /// Whether what a warp did at a time is ordered before what `by` does now, whichever of its lanes did it.
    #[inline]
    pub fn knows(&self, by: By, warp: usize, time: u32) -> bool {
        let times = &self.clock(by).times;
        warp == by.warp || times[warp] >= time || times[2 * self.now.len() + warp] >= time
    }

    /// Whether an access is ordered before what `by` does now.
    #[inline]
    fn knows_access(&self, by: By, access: &Access) -> bool {
        let (whose, clock) = (access.whose as usize, self.clock(by));
        clock.times[whose] >= access.time || whose < self.now.len() && self.knows_lane(by, access, clock)
    }

    /// [`Clocks::knows_access`] of one that not all lanes of its warp have met after, as far as `by` knows.
    #[inline]
    fn knows_lane(&self, by: By, access: &Access, clock: &Clock) -> bool {
        let warp = access.whose as usize;
        let one = access.lane == SEVERAL_LANES || clock.lanes[warp] >> access.lane & 1 == 1;
        // Lanes that do the same together do not race: one of them is the last.
        warp == by.warp
            && (access.time <= self.met[warp]
                || access.lane == SEVERAL_LANES
                || by.lane.is_none_or(|lane| lane == access.lane as usize)
                || access.statement == by.statement)
            || clock.times[2 * self.now.len() + warp] >= access.time && one
    }

    /// Own time of a warp.
    #[inline]
    pub fn now(&self, warp: usize) -> u32 {
        self.now[warp]
    }

    /// Leaves all that `by` knows; what its warp does next is later.
    pub fn release(&mut self, by: By, to: &mut Clock) {
        let (warp, warps) = (by.warp, self.now.len());
        to.join(self.clock(by));
        to.times[warp] = to.times[warp].max(self.met[warp]);
        to.times[2 * warps + warp] = self.now[warp];
        to.lanes[warp] |= by.lane.map_or(u32::MAX, |lane| 1 << lane);
        self.now[warp] += 1;
    }

    /// Leaves what `by` knows of others.
    pub fn tell(&self, by: By, to: &mut Clock) {
        to.join(self.clock(by));
    }

    /// Tells some lanes of a warp what a barrier has gathered.
    pub fn acquire(&mut self, warp: usize, lanes: u32, from: &Clock) {
        let known = &mut self.known[warp];
        for i in 0..known.len() {
            let rest = known[i].lanes & !lanes;
            if known[i].lanes & lanes == 0 {
                continue;
            }
            if rest != 0 {
                let clock = known[i].clock.clone();
                known.push(Known { lanes: rest, clock });
                known[i].lanes &= lanes;
            }
            known[i].clock.join(from);
        }
    }

    /// Lanes of a warp meet: each then knows what any has done and knows.
    #[inline]
    pub fn meet(&mut self, warp: usize, lanes: u32) {
        self.met[warp] = self.now[warp];
        self.now[warp] += 1;
        if self.known[warp].len() > 1 {
            self.gather(warp, lanes);
        }
    }

    #[cold]
    fn gather(&mut self, warp: usize, lanes: u32) {
        let mut all = Known { lanes, clock: Clock::new(self.now.len()) };
        for known in &mut self.known[warp] {
            if known.lanes & lanes != 0 {
                all.clock.join(&known.clock);
                known.lanes &= !lanes;
            }
        }
        self.known[warp].retain(|known| known.lanes != 0);
        self.known[warp].push(all);
    }

    /// A proxy fence: stores that the lanes know are visible to the asynchronous proxy for those who come to know the fence.
    pub fn fence(&mut self, warp: usize, lanes: u32) {
        let warps = self.now.len();
        for known in self.known[warp].iter_mut().filter(|known| known.lanes & lanes != 0) {
            let times = &mut known.clock.times;
            for other in 0..warps {
                times[warps + other] = times[warps + other].max(times[other]).max(times[2 * warps + other]);
            }
            times[warps + warp] = self.now[warp];
        }
        self.now[warp] += 1;
    }

    /// Whether a store of a warp is fenced, as far as `by` knows; copies need no fence.
    #[inline]
    fn fenced(&self, by: By, whose: usize, time: u32) -> bool {
        whose >= self.now.len() || self.clock(by).times[self.now.len() + whose] >= time
    }

    /// Index and first time of an mbarrier that is initialised at an offset.
    pub fn mbarrier(&mut self, offset: usize) -> (usize, u32) {
        let next = 3 * self.now.len() + self.mbarriers.len();
        let found = *self.mbarriers.entry(offset).or_insert((next, 0));
        if found.0 == next {
            self.known.iter_mut().flatten().for_each(|known| known.clock.times.resize(next + 1, 0));
        }
        found
    }

    /// The mbarrier at an offset ends at a time.
    pub fn mbarrier_ends(&mut self, offset: usize, time: u32) {
        if let Some((_, first)) = self.mbarriers.get_mut(&offset) {
            *first = time;
        }
    }
}

/// When each warp last did something to a barrier, and where.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marks(Vec<(u32, u32)>);

impl Marks {
    pub fn set(&mut self, clocks: &Clocks, by: By) {
        if self.0.len() <= by.warp {
            self.0.resize(by.warp + 1, (0, 0));
        }
        self.0[by.warp] = (clocks.now(by.warp), by.statement);
    }

    /// One that `by` does not know.
    pub fn unknown(&self, clocks: &Clocks, by: By) -> Option<By> {
        let warp = (0..self.0.len()).find(|warp| !clocks.knows(by, *warp, self.0[*warp].0))?;
        Some(By { warp, lane: None, statement: self.0[warp].1 })
    }
}

/// What is remembered of a read or write of some bytes of 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// Index in clocks: a warp, or an mbarrier for the copies that count in it.
    whose: u16,
    /// Bytes; none: nothing is remembered.
    mask: u16,
    time: u32,
    statement: u32,
    warp: u8,
    lane: u8,
}

/// The lane of an access by more than one.
const SEVERAL_LANES: u8 = 32;

impl Access {
    fn new(whose: usize, time: u32, by: By) -> Access {
        let lane = by.lane.map_or(SEVERAL_LANES, |lane| lane as u8);
        Access { whose: whose as u16, mask: 0, time, statement: by.statement, warp: by.warp as u8, lane }
    }

    fn same(&self, other: &Access) -> bool {
        (self.whose, self.time, self.statement) == (other.whose, other.time, other.statement)
    }

    /// Becomes that of another's bytes too, if the two differ in nothing else, or (unless `by_lane`) in their lanes.
    fn takes(&mut self, other: &Access, by_lane: bool) -> bool {
        let takes = self.same(other) && (self.lane == other.lane || !by_lane);
        if takes {
            self.mask |= other.mask;
            if self.lane != other.lane {
                self.lane = SEVERAL_LANES;
            }
        }
        takes
    }

    fn by(&self) -> By {
        By { warp: self.warp as usize, lane: None, statement: self.statement }
    }
}

/// The last accesses of a kind to each 16 bytes: N at hand, in the first places, and as many more as differ.
struct Track<const N: usize> {
    last: Vec<[Access; N]>,
    more: HashMap<usize, Vec<Access>>,
    /// Whether accesses of several lanes are told apart.
    by_lane: bool,
}

impl<const N: usize> Track<N> {
    fn new(chunks: usize, by_lane: bool) -> Track<N> {
        Track { last: vec![[Access::default(); N]; chunks], more: HashMap::new(), by_lane }
    }

    fn reset(&mut self) {
        self.last.fill([Access::default(); N]);
        self.more.clear();
    }

    /// The first access to some of the bytes that `find` is true of.
    #[inline]
    fn find(&self, chunk: usize, mask: u16, mut find: impl FnMut(&Access) -> bool) -> Option<Access> {
        let last = &self.last[chunk];
        let mut found = |access: &&Access| access.mask & mask != 0 && find(access);
        let first = last.iter().take_while(|access| access.mask != 0).find(&mut found);
        if first.is_some() || last[N - 1].mask == 0 || self.more.is_empty() {
            return first.copied();
        }
        self.more.get(&chunk)?.iter().find(&mut found).copied()
    }

    /// Changes every access to a chunk, drops those without bytes, and adds one if it has bytes.
    #[inline]
    fn update(&mut self, chunk: usize, change: impl Fn(&mut Access), new: Access) {
        let last = &mut self.last[chunk];
        if last[N - 1].mask != 0 {
            return self.update_many(chunk, change, new);
        }
        let mut kept = 0;
        for i in 0..N {
            let mut access = std::mem::take(&mut last[i]);
            if access.mask == 0 {
                break;
            }
            change(&mut access);
            if access.mask != 0 {
                last[kept] = access;
                kept += 1;
            }
        }
        if !last[..kept].iter_mut().any(|access| access.takes(&new, self.by_lane)) {
            last[kept] = new;
        }
    }

    #[cold]
    fn update_many(&mut self, chunk: usize, change: impl Fn(&mut Access), new: Access) {
        let mut all = self.last[chunk].to_vec();
        all.append(&mut self.more.remove(&chunk).unwrap_or_default());
        all.iter_mut().for_each(change);
        all.retain(|access| access.mask != 0);
        if !all.iter_mut().any(|access| access.takes(&new, self.by_lane)) && new.mask != 0 {
            all.push(new);
        }
        self.last[chunk] = std::array::from_fn(|i| all.get(i).copied().unwrap_or_default());
        if all.len() > N {
            self.more.insert(chunk, all.split_off(N));
        }
    }

    /// Sets the only access to all bytes of a chunk, or none.
    #[inline]
    fn set(&mut self, chunk: usize, access: Access) {
        if self.last[chunk][N - 1].mask != 0 {
            self.more.remove(&chunk);
        }
        self.last[chunk] = [Access::default(); N];
        self.last[chunk][0] = access;
    }
}

/// Chunks of 16 bytes that a range meets, each with a mask of the bytes in it.
#[inline]
fn chunks(offset: usize, bytes: usize) -> impl Iterator<Item = (usize, u16)> {
    let end = offset + bytes;
    (offset / 16..end.div_ceil(16)).map(move |chunk| {
        let (low, high) = (offset.max(16 * chunk) % 16, end.min(16 * chunk + 16) - 16 * chunk);
        (chunk, ((1u32 << high) - (1 << low)) as u16)
    })
}

/// Who read and wrote the bytes of shared memory last.
pub(crate) struct Accesses {
    writes: Track<4>,
    reads: Track<2>,
}

impl Accesses {
    pub fn new(bytes: usize) -> Accesses {
        Accesses { writes: Track::new(bytes / 16, true), reads: Track::new(bytes / 16, false) }
    }

    pub fn reset(&mut self) {
        self.writes.reset();
        self.reads.reset();
    }

    /// Checks a read by a warp against the writes that it must know, and remembers it.
    #[inline]
    pub fn read(&mut self, clocks: &Clocks, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        for (chunk, mask) in chunks(offset, bytes) {
            let unknown = |write: &Access| !clocks.knows_access(by, write);
            if let Some(write) = self.writes.find(chunk, mask, unknown) {
                return Err(unordered(write, "written", offset, bytes, by, doing));
            }
        }
        self.note_read(clocks, offset, bytes, by);
        Ok(())
    }

    /// Remembers a read at the present time of its warp.
    #[inline]
    pub fn note_read(&mut self, clocks: &Clocks, offset: usize, bytes: usize, by: By) {
        let mut access = Access::new(by.warp, clocks.now(by.warp), by);
        for (chunk, mask) in chunks(offset, bytes) {
            // Whoever is ordered after this read is ordered after those that it knows.
            let superseded = |old: &mut Access| {
                if old.mask & !mask == 0 && clocks.knows_access(by, old) {
                    old.mask = 0;
                }
            };
            access.mask = mask;
            self.reads.update(chunk, superseded, access);
        }
    }

    /// Checks a write by a warp against all that it must know.
    #[inline]
    pub fn check_write(&self, clocks: &Clocks, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        for (chunk, mask) in chunks(offset, bytes) {
            let unknown = |old: &Access| !clocks.knows_access(by, old);
            if let Some(write) = self.writes.find(chunk, mask, unknown) {
                return Err(unordered(write, "written", offset, bytes, by, doing));
            }
            if let Some(read) = self.reads.find(chunk, mask, unknown) {
                return Err(unordered(read, "read", offset, bytes, by, doing));
            }
        }
        Ok(())
    }

    /// Remembers a write at the present time of its warp.
    #[inline]
    pub fn write(&mut self, clocks: &Clocks, offset: usize, bytes: usize, by: By) {
        self.put(by.warp, clocks.now(by.warp), offset, bytes, by);
    }

    /// Remembers a write at a time: of a warp, or of the mbarrier that a copy counts in.
    #[inline]
    pub fn put(&mut self, whose: usize, time: u32, offset: usize, bytes: usize, by: By) {
        let mut access = Access::new(whose, time, by);
        for (chunk, mask) in chunks(offset, bytes) {
            access.mask = mask;
            if mask == u16::MAX {
                self.writes.set(chunk, access);
                self.reads.set(chunk, Access::default());
            } else {
                self.writes.update(chunk, |old| old.mask &= !mask, access);
                self.reads.update(chunk, |old| old.mask &= !mask, Access::default());
            }
        }
    }

    /// The different writes that a range holds, added to `to`.
    pub fn writers(&self, offset: usize, bytes: usize, to: &mut Vec<Access>) {
        for (chunk, mask) in chunks(offset, bytes) {
            self.writes.find(chunk, mask, |write| {
                if !to.iter().any(|known| known.same(write)) {
                    to.push(*write);
                }
                false
            });
        }
    }
}

/// Checks that what a warp starts in the asynchronous proxy may read what `writers` wrote.
pub(crate) fn check_proxy_read(clocks: &Clocks, writers: &[Access], by: By, doing: impl Fn() -> String) -> Step {
    for write in writers {
        if !clocks.knows_access(by, write) {
            let what = format!("{}: no barrier orders it after it was written by", doing());
            return Err(Trouble::new(FaultKind::Race, what).other(write.by()));
        }
        if !clocks.fenced(by, write.whose as usize, write.time) {
            let what = format!("{}, with no fence.proxy.async after the ordinary store by", doing());
            return Err(Trouble::new(FaultKind::MissingFence, what).other(write.by()));
        }
    }
    Ok(())
}

#[cold]
fn unordered(old: Access, was: &str, offset: usize, bytes: usize, by: By, doing: &str) -> Box<Trouble> {
    let what = format!(
        "{doing} of {bytes} bytes at shared {:#x}: no barrier orders it after some of them were {was} by",
        shared::address(offset)
    );
    Trouble::by(FaultKind::Race, by, what).other(old.by())
}
