//! How lanes start asynchronous copies.

use super::{Warp, lanes};
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::*;
use crate::race::By;
use crate::shared::misaligned;

impl Warp {
    pub(super) fn bulk(&mut self, block: &mut Block, bulk: &Bulk, statement: u32, active: u32) -> Step {
        for lane in lanes(active) {
            let bytes = self.r32[bulk.bytes as usize][lane] as usize;
            let (_, shared) = self.resolve(Space::Shared, &bulk.shared, lane);
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
        let mut offsets = [0; 32];
        for lane in lanes(active) {
            let (_, shared) = self.resolve(Space::Shared, &copy.shared, lane);
            let offset = block.shared.offset(shared, copy.bytes, copy.bytes, lane)?;
            offsets[lane] = offset as u32;
            let global = self.address(&copy.global, lane);
            let source_bytes = copy.source_bytes.map_or(copy.bytes, |r| self.r32[r as usize][lane] as usize);
            if source_bytes > copy.bytes {
                let what = format!("{source_bytes} bytes of the source for a copy of {}", copy.bytes);
                return Err(Trouble::lane(FaultKind::Operand, lane, what));
            }
            if !global.is_multiple_of(copy.bytes as u64) {
                return Err(misaligned(global, copy.bytes, lane, "global"));
            }
            // Where nothing is copied, the source may lie anywhere.
            if source_bytes > 0 {
                let Some((hint, _)) = block.global.find(global, source_bytes as u64, block.hint) else {
                    let what = format!(
                        "asynchronous copy of {source_bytes} bytes at global {global:#x}: {}",
                        block.global.describe(global)
                    );
                    return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
                };
                block.hint = hint;
            }
            let by = By { warp: self.index, lane: Some(lane), statement };
            block.start_thread_copy(offset, copy.bytes, (global, source_bytes), by)?;
        }
        block.counters.shared[statement as usize].count(&offsets, active, copy.bytes);
        Ok(())
    }
}
