//! Happens-before in a block: which accesses to shared memory are ordered before which.
//!
//! Each warp has a time of its own, and a vector clock (Lamport, Mattern): up to which time it
//! knows what each other warp did. Each access remembers its warp and that warp's time, as in
//! FastTrack (Flanagan and Freund 2009). It is ordered before what another warp does when that
//! warp's clock has come to this time.
//!
//! Clocks travel as barriers let them. An arrival leaves the clock of its warp at the barrier, and
//! whoever waits takes all that arrivals left:
//!
//! ```text
//! warp 0   time 3: store   time 4: arrive
//!                                 \  leaves "warp 0 up to 4"
//! warp 1                           wait    knows warp 0 up to 4
//!                                  load    is ordered after the store
//! ```
//!
//! The same clocks keep two more kinds of time:
//!
//! * The time of an mbarrier is its phase. A bulk copy is ordered before what those do who know
//!   that the phase is complete in which it counts.
//! * Each warp has a time up to which its stores are fenced. The asynchronous proxy may read a
//!   store for those who know a proxy fence after it.

use crate::fault::{FaultKind, Step, Trouble};
use crate::shared;
use std::collections::HashMap;

/// What someone knows of all warps and mbarriers: up to which time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    /// Times by index. W is the number of warps:
    ///
    /// ```text
    /// 0 to W-1      up to when each warp is known, with all its lanes
    /// W to 2W-1     up to when the stores of each warp are fenced
    /// 2W to 3W-1    up to when the lanes in `lanes` of each warp are known
    /// from 3W on    the phases of mbarriers
    /// ```
    times: Vec<u32>,
    /// By warp: the lanes that the third kind of time is about.
    lanes: Vec<u32>,
}

impl Clock {
    /// A clock that knows nothing, of `warps` warps and no mbarrier.
    fn new(warps: usize) -> Clock {
        Clock { times: vec![0; 3 * warps], lanes: vec![0; warps] }
    }

    /// Learns all that another clock knows.
    fn join(&mut self, other: &Clock) {
        self.times.resize(self.times.len().max(other.times.len()), 0);
        self.lanes.resize(self.lanes.len().max(other.lanes.len()), 0);
        self.times.iter_mut().zip(&other.times).for_each(|(time, other)| *time = (*time).max(*other));
        self.lanes.iter_mut().zip(&other.lanes).for_each(|(lanes, other)| *lanes |= other);
    }

    /// Learns the phase of an mbarrier.
    pub fn set_phases(&mut self, whose: usize, time: u32) {
        self.times.resize(self.times.len().max(whose + 1), 0);
        self.times[whose] = time;
    }

    pub fn clear(&mut self) {
        self.times.clear();
        self.lanes.clear();
    }
}

/// Who does something, and by which statement. There is no lane where the whole warp does it.
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
    /// The time of each warp, which is the same for all its lanes, and the time when they last met.
    now: Vec<u32>,
    met: Vec<u32>,
    /// What the lanes of each warp know of others. All lanes know the same, until some wait for a
    /// barrier without the rest.
    known: Vec<Vec<Known>>,
    /// By offset: the index of each mbarrier that ever was, and its time when it was last
    /// initialised.
    mbarriers: HashMap<usize, (usize, u32)>,
}

impl Clocks {
    pub fn new(warps: usize) -> Clocks {
        let known = (0..warps).map(|_| Vec::new()).collect();
        Clocks { now: vec![0; warps], met: vec![0; warps], known, mbarriers: HashMap::new() }
    }

    /// Makes all as new for the next block.
    pub fn reset(&mut self) {
        let warps = self.now.len();
        self.mbarriers.clear();
        // Everything is later than time 0.
        self.now.fill(1);
        self.met.fill(0);
        for known in &mut self.known {
            known.clear();
            known.push(Known { lanes: u32::MAX, clock: Clock::new(warps) });
        }
    }

    /// The clock of a lane, or of lane 0 where the whole warp acts.
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

    /// Whether what a warp did at a time is ordered before what `by` does now. Its lanes are not
    /// told apart.
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

    /// Does what [`Clocks::knows_access`] does, for an access of a warp. As far as `by` knows, the
    /// lanes of that warp have not met since.
    #[inline]
    fn knows_lane(&self, by: By, access: &Access, clock: &Clock) -> bool {
        let warp = access.whose as usize;
        let one = access.lane == SEVERAL_LANES || clock.lanes[warp] >> access.lane & 1 == 1;
        // Lanes that execute the same statement together do not race: one of them is the last.
        warp == by.warp
            && (access.time <= self.met[warp]
                || access.lane == SEVERAL_LANES
                || by.lane.is_none_or(|lane| lane == access.lane as usize)
                || access.statement == by.statement)
            || clock.times[2 * self.now.len() + warp] >= access.time && one
    }

    /// The time of a warp.
    #[inline]
    pub fn now(&self, warp: usize) -> u32 {
        self.now[warp]
    }

    /// Leaves at a barrier what `by` knows and has done. What its warp does next is later.
    pub fn release(&mut self, by: By, to: &mut Clock) {
        let (warp, warps) = (by.warp, self.now.len());
        to.join(self.clock(by));
        to.times[warp] = to.times[warp].max(self.met[warp]);
        to.times[2 * warps + warp] = self.now[warp];
        to.lanes[warp] |= by.lane.map_or(u32::MAX, |lane| 1 << lane);
        self.now[warp] += 1;
    }

    /// Leaves at a barrier what `by` knows of others, but not what it has done.
    pub fn tell(&self, by: By, to: &mut Clock) {
        to.join(self.clock(by));
    }

    /// Some lanes of a warp learn what was left at a barrier.
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

    /// Lanes of a warp meet. Each then knows what any of them has done and knows.
    #[inline]
    pub fn meet(&mut self, warp: usize, lanes: u32) {
        self.met[warp] = self.now[warp];
        self.now[warp] += 1;
        if self.known[warp].len() > 1 {
            self.gather(warp, lanes);
        }
    }

    /// Lanes of a warp share one clock from now on.
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

    /// Lanes of a warp execute a proxy fence. It fences all stores that they know. The asynchronous
    /// proxy sees those for whoever knows the fence.
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

    /// Whether a store is fenced, as far as `by` knows. Copies of an mbarrier need no fence.
    #[inline]
    fn fenced(&self, by: By, whose: usize, time: u32) -> bool {
        whose >= self.now.len() || self.clock(by).times[self.now.len() + whose] >= time
    }

    /// The index and the first time of an mbarrier that is initialised at an offset.
    pub fn mbarrier(&mut self, offset: usize) -> (usize, u32) {
        let next = 3 * self.now.len() + self.mbarriers.len();
        let found = *self.mbarriers.entry(offset).or_insert((next, 0));
        if found.0 == next {
            self.known.iter_mut().flatten().for_each(|known| known.clock.times.resize(next + 1, 0));
        }
        found
    }

    /// The mbarrier at an offset is invalidated at a time. The next one there starts at this time.
    pub fn mbarrier_ends(&mut self, offset: usize, time: u32) {
        if let Some((_, first)) = self.mbarriers.get_mut(&offset) {
            *first = time;
        }
    }
}

/// When each warp last did something to a barrier, and by which statement.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marks(Vec<(u32, u32)>);

impl Marks {
    /// Remembers that `by` does it now.
    pub fn set(&mut self, clocks: &Clocks, by: By) {
        if self.0.len() <= by.warp {
            self.0.resize(by.warp + 1, (0, 0));
        }
        self.0[by.warp] = (clocks.now(by.warp), by.statement);
    }

    /// Someone who did it, of which `by` does not know.
    pub fn unknown(&self, clocks: &Clocks, by: By) -> Option<By> {
        let warp = (0..self.0.len()).find(|warp| !clocks.knows(by, *warp, self.0[*warp].0))?;
        Some(By { warp, lane: None, statement: self.0[warp].1 })
    }
}

/// What is remembered of a read or write, within a chunk of 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// The index in clocks: of the warp, or of the mbarrier that a bulk copy counts in.
    whose: u16,
    /// The bytes, one bit for each. Without any, nothing is remembered.
    mask: u16,
    /// When it was made, in the time of `whose`.
    time: u32,
    statement: u32,
    warp: u8,
    /// The lane, or [`SEVERAL_LANES`].
    lane: u8,
}

/// What [`Access::lane`] is when more than one lane made the access, or the warp as a whole.
const SEVERAL_LANES: u8 = 32;

impl Access {
    fn new(whose: usize, time: u32, by: By) -> Access {
        let lane = by.lane.map_or(SEVERAL_LANES, |lane| lane as u8);
        Access { whose: whose as u16, mask: 0, time, statement: by.statement, warp: by.warp as u8, lane }
    }

    /// Whether both are the same access, to whatever bytes.
    fn same(&self, other: &Access) -> bool {
        (self.whose, self.time, self.statement) == (other.whose, other.time, other.statement)
    }

    /// Takes over the bytes of another, if both are the same access. With `by_lane`, they must have
    /// the same lane too. Tells whether it did.
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

    /// Who made it.
    fn by(&self) -> By {
        By { warp: self.warp as usize, lane: None, statement: self.statement }
    }
}

/// The last accesses of a kind to each chunk of 16 bytes. N of them are at hand, in the first
/// places of an array. More are rare, and lie in a map.
struct Track<const N: usize> {
    last: Vec<[Access; N]>,
    more: HashMap<usize, Vec<Access>>,
    /// Whether accesses by different lanes are told apart.
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

    /// The first access to some of the bytes for which `find` holds.
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

    /// Changes every access to a chunk, drops those without bytes, and adds a new one if it has
    /// bytes.
    #[inline]
    fn update(&mut self, chunk: usize, change: impl Fn(&mut Access), new: Access) {
        let last = &mut self.last[chunk];
        if last[N - 1].mask != 0 && !self.more.is_empty() {
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
        if last[..kept].iter_mut().any(|access| access.takes(&new, self.by_lane)) {
            return;
        }
        match last.get_mut(kept) {
            Some(place) => *place = new,
            None if new.mask != 0 => drop(self.more.insert(chunk, vec![new])),
            None => {}
        }
    }

    /// Does what [`Track::update`] does, where more than N accesses may be.
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

    /// Forgets all accesses to a chunk, and remembers one if it has bytes.
    #[inline]
    fn set(&mut self, chunk: usize, access: Access) {
        if self.last[chunk][N - 1].mask != 0 {
            self.more.remove(&chunk);
        }
        self.last[chunk] = [Access::default(); N];
        self.last[chunk][0] = access;
    }
}

/// The chunks of 16 bytes in which a range has bytes, each with a mask of these bytes.
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
    /// Up to eight warps read the same tile.
    reads: Track<8>,
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

    /// Remembers a read, at the time of its warp.
    #[inline]
    pub fn note_read(&mut self, clocks: &Clocks, offset: usize, bytes: usize, by: By) {
        let mut access = Access::new(by.warp, clocks.now(by.warp), by);
        for (chunk, mask) in chunks(offset, bytes) {
            // Whoever is ordered after this read is ordered after earlier reads that it knows.
            let superseded = |old: &mut Access| {
                if old.mask & mask != 0 && clocks.knows_access(by, old) {
                    old.mask &= !mask;
                }
            };
            access.mask = mask;
            self.reads.update(chunk, superseded, access);
        }
    }

    /// Checks a write by a warp against the writes and reads that it must know.
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

    /// Remembers a write, at the time of its warp.
    #[inline]
    pub fn write(&mut self, clocks: &Clocks, offset: usize, bytes: usize, by: By) {
        self.put(by.warp, clocks.now(by.warp), offset, bytes, by);
    }

    /// Remembers a write, at a time of a warp or of the mbarrier that a bulk copy counts in.
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

    /// Adds the different writes that a range holds to `to`.
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

/// Checks that a warp may start what reads in the asynchronous proxy, after what `writers` wrote.
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

/// The fault that an access is not ordered after an earlier one.
#[cold]
fn unordered(old: Access, was: &str, offset: usize, bytes: usize, by: By, doing: &str) -> Box<Trouble> {
    let what = format!(
        "{doing} of {bytes} bytes at shared {:#x}: no barrier orders it after some of them were {was} by",
        shared::address(offset)
    );
    Trouble::by(FaultKind::Race, by, what).other(old.by())
}
