//! Named barriers, barriers of a warp, and mbarriers.

use super::{Decode, Decoder, Mods, Ty};
use crate::isa::*;
use crate::parse::{Class, Operand, Statement};

impl Decoder<'_> {
    pub(super) fn barrier(&mut self, bar: bool, s: &Statement, m: &mut Mods) -> Decode {
        if m.take("warp") {
            if !bar || !m.take("sync") {
                return Err("only bar.warp.sync is known".into());
            }
            let mask = self.u32_at(s, 0)?;
            self.push(Op::WarpSync(mask));
            return Ok(());
        }
        if m.parts.contains(&"cluster") {
            return Err("clusters are not emulated".into());
        }
        m.take("cta");
        let aligned = m.take("aligned") | bar;
        let zero = self.const32(0);
        if m.take("red") {
            let kind = m.find(|part| {
                Some(match part {
                    "popc" => BarrierKind::Popc,
                    "and" => BarrierKind::And,
                    "or" => BarrierKind::Or,
                    _ => return None,
                })
            });
            let kind = kind.ok_or("the reduction is unknown")?;
            m.ty()?;
            let d = self.dst(s, 0, if kind == BarrierKind::Popc { Class::R32 } else { Class::Pred })?;
            let id = self.u32_at(s, 1)?;
            let (count, last) = match s.operands.len() {
                4 => (Some(self.u32_at(s, 2)?), 3),
                _ => (None, 2),
            };
            let predicate = self.operand(s, last)?.clone();
            let (p, p_negated) = self.predicate(&predicate)?;
            self.push(Op::NamedBarrier(Box::new(NamedBarrier { kind, aligned, id, count, d, p, p_negated })));
            return Ok(());
        }
        let kind = match (m.take("sync"), m.take("arrive")) {
            (true, false) => BarrierKind::Sync,
            (false, true) => BarrierKind::Arrive,
            _ => return Err("only sync, arrive and red barriers are known".into()),
        };
        let id = if s.operands.is_empty() { zero } else { self.u32_at(s, 0)? };
        let count = if s.operands.len() > 1 { Some(self.u32_at(s, 1)?) } else { None };
        if kind == BarrierKind::Arrive && count.is_none() {
            return Err("an arrival needs the number of threads".into());
        }
        let barrier = NamedBarrier { kind, aligned, id, count, d: 0, p: self.true_predicate, p_negated: false };
        self.push(Op::NamedBarrier(Box::new(barrier)));
        Ok(())
    }

    pub(super) fn mbarrier(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let name = m.first();
        let (expect, no_complete, parity) = (m.take("expect_tx"), m.take("noComplete"), m.take("parity"));
        m.memory_words();
        let space = m.space()?;
        if !m.take("b64") {
            return Err("mbarrier objects are `.b64`".into());
        }
        let (kind, at) = match name {
            "init" => (MbarrierKind::Init { count: self.u32_at(s, 1)? }, 0),
            "inval" => (MbarrierKind::Invalidate, 0),
            "expect_tx" => (MbarrierKind::ExpectTx { bytes: self.u32_at(s, 1)? }, 0),
            "complete_tx" => (MbarrierKind::CompleteTx { bytes: self.u32_at(s, 1)? }, 0),
            "arrive" | "arrive_drop" if !no_complete => {
                let at = match self.operand(s, 0)? {
                    Operand::Address(..) => 0,
                    _ => 1,
                };
                let state = match self.operand(s, 0)? {
                    Operand::Reg(reg) => Some(self.reg(&Operand::Reg(*reg), Class::R64)?.index),
                    _ => None,
                };
                let value = if s.operands.len() > at + 1 { Some(self.u32_at(s, at + 1)?) } else { None };
                if expect && value.is_none() {
                    return Err("the byte count is missing".into());
                }
                let (count, bytes) = if expect { (None, value) } else { (value, None) };
                (MbarrierKind::Arrive { count, expect: bytes, drop: name == "arrive_drop", state }, at)
            }
            "test_wait" | "try_wait" => {
                let p = self.dst(s, 0, Class::Pred)?;
                let phase =
                    if parity { Phase::Parity(self.u32_at(s, 2)?) } else { Phase::State(self.a64(s, 2, Ty::B(64))?) };
                (MbarrierKind::Test { p, phase, blocking: name == "try_wait" }, 1)
            }
            _ => return Err(format!("unknown instruction `mbarrier.{name}`")),
        };
        let address = self.address(s, at, if space == Space::Generic { Space::Generic } else { Space::Shared })?;
        self.push(Op::Mbarrier(Box::new(MbarrierUse { kind, space, address })));
        Ok(())
    }
}
