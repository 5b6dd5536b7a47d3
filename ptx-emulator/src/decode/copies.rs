//! Asynchronous copies: those of single threads (`cp.async`) and bulk copies.

use super::{Decode, Decoder, Mods};
use crate::isa::*;
use crate::parse::Statement;

impl Decoder<'_> {
    pub(super) fn copy(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("async") {
            return Err("of `cp` only `cp.async` is known".into());
        }
        if m.take("bulk") { self.bulk_copy(s, m) } else { self.async_copy(s, m) }
    }

    fn async_copy(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if m.take("commit_group") {
            self.push(Op::AsyncCommit);
            return Ok(());
        }
        if m.take("wait_all") {
            self.push(Op::AsyncCommit);
            self.push(Op::AsyncWait { pending: 0 });
            return Ok(());
        }
        if m.take("wait_group") {
            let pending = self.immediate(s, 0)? as u32;
            self.push(Op::AsyncWait { pending });
            return Ok(());
        }
        if m.take("mbarrier") {
            return Err("arrivals of `cp.async` at an mbarrier are unknown: only waits for groups are known".into());
        }
        let (ca, cg) = (m.take("ca"), m.take("cg"));
        if ca == cg {
            return Err("the copy needs one of `.ca` and `.cg`".into());
        }
        m.memory_words();
        let hint = m.take("L2::cache_hint") as usize;
        let (to, from) = (m.space()?, m.space()?);
        if (to, from) != (Space::Shared, Space::Global) {
            return Err(format!("copies from {} to {} memory are unknown", from.name(), to.name()));
        }
        let operands = s.operands.len() - hint.min(s.operands.len());
        if !(3..=4).contains(&operands) {
            return Err(format!("{} operands instead of {} or {}", s.operands.len(), 3 + hint, 4 + hint));
        }
        let bytes = self.immediate(s, 2)?;
        if !(bytes == 16 || ca && matches!(bytes, 4 | 8)) {
            return Err(format!("a copy of {bytes} bytes: 16, or 4 or 8 with `.ca`"));
        }
        let (shared, global) = (self.address(s, 0, Space::Shared)?, self.address(s, 1, Space::Global)?);
        let source_bytes = if operands == 4 { Some(self.u32_at(s, 3)?) } else { None };
        self.push(Op::AsyncCopy(Box::new(AsyncCopy { shared, global, bytes: bytes as usize, source_bytes })));
        Ok(())
    }

    fn bulk_copy(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if m.take("commit_group") {
            self.push(Op::BulkCommit);
            return Ok(());
        }
        if m.take("wait_group") {
            m.take("read");
            let pending = self.immediate(s, 0)? as u32;
            self.push(Op::BulkWait { pending });
            return Ok(());
        }
        if m.take("prefetch") {
            m.take("L2");
            m.take("L2::cache_hint");
            let space = m.space()?;
            let address = self.address(s, 0, space)?;
            self.push(Op::Prefetch(address));
            return Ok(());
        }
        m.take("L2::cache_hint");
        let load = m.parts.first().is_some_and(|part| part.starts_with("shared"));
        if m.parts.len() < 2 {
            return Err("the copy has no spaces".into());
        }
        let (to, from) = (m.parts.remove(0), m.parts.remove(0));
        let bytes = self.u32_at(s, 2)?;
        let bulk = if load && from == "global" {
            if !m.take("mbarrier::complete_tx::bytes") {
                return Err("a copy to shared memory needs .mbarrier::complete_tx::bytes".into());
            }
            Bulk {
                shared: self.address(s, 0, Space::Shared)?,
                global: self.address(s, 1, Space::Global)?,
                bytes,
                barrier: Some(self.address(s, 3, Space::Shared)?),
            }
        } else if to == "global" && from == "shared::cta" {
            if !m.take("bulk_group") {
                return Err("a copy from shared memory needs .bulk_group".into());
            }
            Bulk {
                shared: self.address(s, 1, Space::Shared)?,
                global: self.address(s, 0, Space::Global)?,
                bytes,
                barrier: None,
            }
        } else {
            return Err(format!("copies from {from} to {to} are unknown"));
        };
        self.push(Op::Bulk(Box::new(bulk)));
        Ok(())
    }
}
