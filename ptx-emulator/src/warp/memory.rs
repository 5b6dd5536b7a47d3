//! Loads, stores and atomics of a warp, lane by lane.

use super::{Warp, first, lanes, put, space_of};
use crate::alu::*;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::global::{Span, store_part};
use crate::isa::*;
use crate::race::By;
use crate::shared::misaligned;
use std::sync::atomic::Ordering::Relaxed;

impl Warp {
    /// The address of a lane, in the state space of the instruction.
    #[inline(always)]
    pub(super) fn address(&self, address: &Address, lane: usize) -> u64 {
        let base = match address.base {
            Base::None => 0,
            Base::R32(r) => self.r32[r as usize][lane] as u64,
            Base::R64(r) => self.r64[r as usize][lane],
        };
        let sum = base.wrapping_add(address.offset as u64);
        if let Base::R32(_) = address.base { sum & 0xffff_ffff } else { sum }
    }

    /// The address of a lane, and its space. A generic address becomes one in the space of its
    /// window.
    #[inline(always)]
    pub(crate) fn resolve(&self, space: Space, address: &Address, lane: usize) -> (Space, u64) {
        let address = self.address(address, lane);
        if space == Space::Generic { space_of(address) } else { (space, address) }
    }

    /// The allocation that holds all bytes of an access, which must be aligned.
    #[inline]
    pub(super) fn global<'a>(
        &self,
        block: &mut Block<'a>,
        address: u64,
        bytes: usize,
        lane: usize,
        doing: &str,
    ) -> Step<Span<'a>> {
        let Some((hint, span)) = block.global.find(address, bytes as u64, block.hint) else {
            let what = format!("{doing} of {bytes} bytes at global {address:#x}: {}", block.global.describe(address));
            return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
        };
        block.hint = hint;
        if address & (bytes as u64 - 1) != 0 {
            return Err(misaligned(address, bytes, lane, "global"));
        }
        Ok(span)
    }

    /// The byte of an access in [`Warp::local`].
    fn local_offset(&self, address: u64, bytes: usize, lane: usize) -> Step<usize> {
        let size = self.local.len() as u64 / 32 * 4;
        if address > size || bytes as u64 > size - address {
            let what = format!("{bytes} bytes at local address {address:#x} of {size} bytes");
            return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
        }
        if address & (bytes as u64 - 1) != 0 {
            return Err(misaligned(address, bytes, lane, "local"));
        }
        Ok(lane * size as usize + address as usize)
    }

    #[inline(always)]
    pub(super) fn load(&mut self, block: &mut Block, access: &LoadStore, statement: u32, active: u32) -> Step {
        let bytes = access.width * access.slots.len();
        let (mut offsets, mut shared) = ([0; 32], 0);
        // A parameter is the same for all lanes, so one of them loads it.
        let parameter = access.space == Space::Param && matches!(access.address.base, Base::None);
        let loading = if parameter { active & active.wrapping_neg() } else { active };
        for lane in lanes(loading) {
            let (space, address) = self.resolve(access.space, &access.address, lane);
            let mut words = [0u32; 8];
            let part = (address % 4) as usize;
            match space {
                Space::Shared => {
                    let offset = block.shared.offset(address, bytes, bytes, lane)?;
                    (offsets[lane], shared) = (offset as u32, shared | 1 << lane);
                    let by = By { warp: self.index, lane: Some(lane), statement };
                    if access.strong {
                        block.shared.before_strong(offset, bytes, by, active);
                    }
                    block.shared.read(offset, bytes, by, "read")?;
                    if access.strong {
                        block.shared.after_strong(offset, bytes, by);
                    }
                    for (i, word) in words[..bytes.div_ceil(4)].iter_mut().enumerate() {
                        *word = block.shared.word(offset + 4 * i);
                    }
                }
                Space::Global | Space::Generic => {
                    let span = self.global(block, address, bytes, lane, "read")?;
                    for (word, source) in words.iter_mut().zip(span.words(address, bytes)) {
                        *word = source.load(Relaxed);
                    }
                }
                Space::Local => {
                    let offset = self.local_offset(address, bytes, lane)? / 4;
                    words[..bytes.div_ceil(4)].copy_from_slice(&self.local[offset..offset + bytes.div_ceil(4)]);
                }
                Space::Param => {
                    let size = block.params.len() as u64;
                    if address > size || bytes as u64 > size - address {
                        let what = format!("{bytes} bytes at parameter offset {address:#x} of {size} bytes");
                        return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
                    }
                    if address & (bytes as u64 - 1) != 0 {
                        return Err(misaligned(address, bytes, lane, "parameter"));
                    }
                    let source = &block.params[address as usize - part..];
                    for (i, byte) in source.iter().take(bytes + part).enumerate() {
                        words[i / 4] |= (*byte as u32) << (8 * (i % 4));
                    }
                }
            }
            words[0] >>= 8 * part as u32;
            if access.width == 4 {
                for (slot, word) in access.slots.iter().zip(words) {
                    match *slot {
                        Slot::R32(r, _) => self.r32[r as usize][lane] = word,
                        slot => self.put_slot(slot, lane, element(&[word; 8], 0, 4, access.signed)),
                    }
                }
            } else {
                for (i, slot) in access.slots.iter().enumerate() {
                    self.put_slot(*slot, lane, element(&words, i, access.width, access.signed));
                }
            }
        }
        if parameter {
            for slot in &access.slots {
                match *slot {
                    Slot::R32(r, _) => spread(&mut self.r32[r as usize], active),
                    Slot::R64(r) => spread(&mut self.r64[r as usize], active),
                    Slot::Sink => {}
                }
            }
        }
        block.counters.shared[statement as usize].count(&offsets, shared, bytes);
        block.counters.loaded += (bytes * active.count_ones() as usize) as u64;
        Ok(())
    }

    /// Writes a loaded value to a register. The value is extended to 64 bits by the sign of its
    /// type.
    #[inline]
    fn put_slot(&mut self, slot: Slot, lane: usize, value: u64) {
        match slot {
            Slot::R32(r, 32) => self.r32[r as usize][lane] = value as u32,
            Slot::R32(r, _) => self.r32[r as usize][lane] = value as u32 & 0xffff,
            Slot::R64(r) => self.r64[r as usize][lane] = value,
            Slot::Sink => {}
        }
    }

    #[inline]
    fn get_slot(&self, slot: Slot, lane: usize) -> u64 {
        match slot {
            Slot::R32(r, _) => self.r32[r as usize][lane] as u64,
            Slot::R64(r) => self.r64[r as usize][lane],
            Slot::Sink => 0,
        }
    }

    #[inline(always)]
    pub(super) fn store(&mut self, block: &mut Block, access: &LoadStore, statement: u32, active: u32) -> Step {
        let bytes = access.width * access.slots.len();
        let (mut offsets, mut shared) = ([0; 32], 0);
        for lane in lanes(active) {
            let (space, address) = self.resolve(access.space, &access.address, lane);
            let mut words = [0u32; 8];
            if bytes < 4 {
                for (i, slot) in access.slots.iter().enumerate() {
                    let mask = if access.width == 1 { 0xff } else { 0xffff };
                    words[0] |= (self.get_slot(*slot, lane) as u32 & mask) << (8 * access.width * i);
                }
            } else {
                for (i, slot) in access.slots.iter().enumerate() {
                    let value = self.get_slot(*slot, lane);
                    match access.width {
                        8 => (words[2 * i], words[2 * i + 1]) = (value as u32, (value >> 32) as u32),
                        4 => words[i] = value as u32,
                        2 => words[i / 2] |= (value as u32 & 0xffff) << (16 * (i % 2)),
                        _ => words[i / 4] |= (value as u32 & 0xff) << (8 * (i % 4)),
                    }
                }
            }
            let by = By { warp: self.index, lane: Some(lane), statement };
            if space == Space::Shared {
                (offsets[lane], shared) = (address.wrapping_sub(SHARED_BASE as u64) as u32, shared | 1 << lane);
            }
            if access.strong && space == Space::Shared {
                let offset = block.shared.offset(address, bytes, bytes, lane)?;
                block.shared.before_strong(offset, bytes, by, active);
                self.store_words(block, space, address, bytes, &words, by)?;
                block.shared.after_strong(offset, bytes, by);
            } else {
                self.store_words(block, space, address, bytes, &words, by)?;
            }
        }
        block.counters.shared[statement as usize].count(&offsets, shared, bytes);
        block.counters.stored += (bytes * active.count_ones() as usize) as u64;
        block.progress += 1;
        Ok(())
    }

    /// Stores the first `bytes` of `words`, for one lane. They are 1, 2, or whole words.
    #[inline]
    pub(crate) fn store_words(
        &mut self,
        block: &mut Block,
        space: Space,
        address: u64,
        bytes: usize,
        words: &[u32; 8],
        by: By,
    ) -> Step {
        let lane = by.lane.unwrap_or(0);
        match space {
            Space::Shared => {
                let offset = block.shared.offset(address, bytes, bytes, lane)?;
                block.check_write(offset, bytes, by, "store")?;
                block.shared.store(offset, bytes, words, by);
            }
            Space::Global | Space::Generic => {
                let span = self.global(block, address, bytes, lane, "store")?;
                if bytes < 4 {
                    store_part(span.word(address), (address % 4) as usize, bytes, words[0]);
                } else {
                    for (target, word) in span.words(address, bytes).iter().zip(words) {
                        target.store(*word, Relaxed);
                    }
                }
            }
            Space::Local => {
                let offset = self.local_offset(address, bytes, lane)?;
                if bytes < 4 {
                    let (shift, mask) = (8 * (offset % 4), if bytes == 1 { 0xff } else { 0xffff });
                    let word = &mut self.local[offset / 4];
                    *word = *word & !(mask << shift) | (words[0] & mask) << shift;
                } else {
                    self.local[offset / 4..(offset + bytes) / 4].copy_from_slice(&words[..bytes / 4]);
                }
            }
            Space::Param => {
                return Err(Trouble::lane(FaultKind::OutOfBounds, lane, "store to the read-only parameter space"));
            }
        }
        Ok(())
    }

    pub(super) fn atomic(&mut self, block: &mut Block, atomic: &Atomic, statement: u32, active: u32) -> Step {
        let width = atomic.width;
        let total = width * atomic.b.len();
        for lane in lanes(active) {
            let (space, base) = self.resolve(atomic.space, &atomic.address, lane);
            if base & (total as u64 - 1) != 0 {
                return Err(misaligned(base, total, lane, space.name()));
            }
            for i in 0..atomic.b.len() {
                let address = base + (i * width) as u64;
                let b = self.get_slot(atomic.b[i], lane);
                let c = atomic.c.map_or(0, |slot| self.get_slot(slot, lane));
                let new = |old: u64| combine(atomic.op, atomic.kind, width, old, b, c);
                let old = match space {
                    Space::Shared => {
                        let offset = block.shared.offset(address, width, width, lane)?;
                        let by = By { warp: self.index, lane: Some(lane), statement };
                        block.shared.before_strong(offset, width, by, active);
                        block.shared.read(offset, width, by, "atomic")?;
                        block.check_write(offset, width, by, "atomic")?;
                        let word = block.shared.word(offset) as u64 >> (8 * (offset % 4));
                        let old = match width {
                            8 => word | (block.shared.word(offset + 4) as u64) << 32,
                            2 => word & 0xffff,
                            _ => word,
                        };
                        let value = new(old);
                        let words = [value as u32, (value >> 32) as u32, 0, 0, 0, 0, 0, 0];
                        block.shared.store(offset, width, &words, by);
                        block.shared.after_strong(offset, width, by);
                        old
                    }
                    Space::Global | Space::Generic => {
                        let span = self.global(block, address, width, lane, "atomic")?;
                        let word = span.word(address);
                        match width {
                            8 => {
                                let guard = block.global.wide.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                                let high = span.word(address + 4);
                                let old = word.load(Relaxed) as u64 | (high.load(Relaxed) as u64) << 32;
                                let value = new(old);
                                word.store(value as u32, Relaxed);
                                high.store((value >> 32) as u32, Relaxed);
                                drop(guard);
                                old
                            }
                            _ => {
                                let shift = 8 * (address % 4) as u32;
                                let mask = if width == 2 { 0xffffu32 } else { u32::MAX };
                                let update = |whole: u32| {
                                    let value = new((whole >> shift & mask) as u64) as u32;
                                    Some(whole & !(mask << shift) | (value & mask) << shift)
                                };
                                let whole = word.fetch_update(Relaxed, Relaxed, update).unwrap_or_else(|old| old);
                                (whole >> shift & mask) as u64
                            }
                        }
                    }
                    Space::Local | Space::Param => {
                        return Err(Trouble::lane(
                            FaultKind::OutOfBounds,
                            lane,
                            "atomic outside global and shared memory",
                        ));
                    }
                };
                if let Some(slot) = atomic.old.get(i) {
                    self.put_slot(*slot, lane, old);
                }
            }
        }
        block.progress += 1;
        Ok(())
    }
}

/// Gives the value of the lowest active lane to all active lanes.
fn spread<T: Copy>(register: &mut Lanes<T>, active: u32) {
    let value = register[first(active)];
    put(register, &[value; 32], active);
}

/// Element `i` of loaded words, extended to 64 bits by its sign if `signed` is set.
#[inline]
fn element(words: &[u32; 8], i: usize, width: usize, signed: bool) -> u64 {
    match width {
        8 => words[2 * i] as u64 | (words[2 * i + 1] as u64) << 32,
        4 if signed => words[i] as i32 as i64 as u64,
        4 => words[i] as u64,
        2 => {
            let value = words[i / 2] >> (16 * (i % 2)) & 0xffff;
            if signed { value as i16 as i64 as u64 } else { value as u64 }
        }
        _ => {
            let value = words[i / 4] >> (8 * (i % 4)) & 0xff;
            if signed { value as i8 as i64 as u64 } else { value as u64 }
        }
    }
}

/// The new value of an atomic operation.
fn combine(op: AtomicOp, kind: AtomicType, width: usize, old: u64, b: u64, c: u64) -> u64 {
    use AtomicOp::*;
    match op {
        Exchange => return b,
        CompareSwap => {
            let mask = if width == 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
            return if old & mask == b & mask { c } else { old };
        }
        And => return old & b,
        Or => return old | b,
        Xor => return old ^ b,
        Inc => return if old >= b { 0 } else { old + 1 },
        Dec => return if old == 0 || old > b { b } else { old - 1 },
        Add | Min | Max => {}
    }
    let lane32 = |row: Binary32| binary32(row, &[old as u32; 32], &[b as u32; 32])[0] as u64;
    let lane64 = |row: Binary64| binary64(row, &[old; 32], &[b; 32])[0];
    match (kind, op, width) {
        (AtomicType::Unsigned | AtomicType::Signed, Add, 8) => old.wrapping_add(b),
        (AtomicType::Unsigned | AtomicType::Signed, Add, _) => (old as u32).wrapping_add(b as u32) as u64,
        (AtomicType::Unsigned, Min, _) => old.min(b),
        (AtomicType::Unsigned, _, _) => old.max(b),
        (AtomicType::Signed, Min, 8) => lane64(Binary64::MinS),
        (AtomicType::Signed, _, 8) => lane64(Binary64::MaxS),
        (AtomicType::Signed, Min, _) => lane32(Binary32::MinS),
        (AtomicType::Signed, _, _) => lane32(Binary32::MaxS),
        (AtomicType::F64, Add, _) => lane64(Binary64::AddF64),
        (AtomicType::F64, Min, _) => lane64(Binary64::MinF64),
        (AtomicType::F64, _, _) => lane64(Binary64::MaxF64),
        (AtomicType::F32, Add, _) => lane32(Binary32::AddF32),
        (AtomicType::F32, Min, _) => lane32(Binary32::MinF32),
        (AtomicType::F32, _, _) => lane32(Binary32::MaxF32),
        (AtomicType::F16, Add, _) => lane32(Binary32::AddF16),
        (AtomicType::F16, Min, _) => lane32(Binary32::MinF16),
        (AtomicType::F16, _, _) => lane32(Binary32::MaxF16),
        (AtomicType::Bf16, Add, _) => lane32(Binary32::AddBf16),
        (AtomicType::Bf16, Min, _) => lane32(Binary32::MinBf16),
        (AtomicType::Bf16, _, _) => lane32(Binary32::MaxBf16),
        (AtomicType::F16x2, Add, _) => lane32(Binary32::AddF16x2),
        (AtomicType::F16x2, Min, _) => lane32(Binary32::MinF16x2),
        (AtomicType::F16x2, _, _) => lane32(Binary32::MaxF16x2),
        (AtomicType::Bf16x2, Add, _) => lane32(Binary32::AddBf16x2),
        (AtomicType::Bf16x2, Min, _) => lane32(Binary32::MinBf16x2),
        (AtomicType::Bf16x2, _, _) => lane32(Binary32::MaxBf16x2),
    }
}
