//! Memory, synchronisation, asynchronous copies and matrix products.

use super::{Decode, Decoder, Mods, Ty};
use crate::alu::{Binary64, Unary64};
use crate::isa::*;
use crate::parse::{Class, Operand, Statement};

impl Decoder<'_> {
    pub(super) fn cvta(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let to = m.take("to");
        let space = m.space()?;
        if m.ty()?.bits() != 64 {
            return Err("32-bit generic addresses are unknown".into());
        }
        let window = match space {
            Space::Shared => SHARED_WINDOW,
            Space::Local => LOCAL_WINDOW,
            Space::Param => PARAM_WINDOW,
            Space::Global | Space::Generic => 0,
        };
        let (d, a) = (self.d64(s)?, self.a64(s, 1, Ty::U(64))?);
        if window == 0 {
            self.push(Op::Unary64(Unary64::Mov, d, a));
        } else {
            let window = self.const64(window);
            self.push(Op::Binary64(if to { Binary64::Sub } else { Binary64::Add }, d, a, window));
        }
        Ok(())
    }

    pub(super) fn load_store(&mut self, store: bool, s: &Statement, m: &mut Mods) -> Decode {
        let strong = m.memory_words();
        let hint = m.take("L2::cache_hint");
        let space = m.space()?;
        let lanes = m.vector();
        let ty = m.ty()?;
        if ty.bits() < 8 || ty.bits() as usize * lanes > 256 {
            return Err(format!("{lanes} elements of {} bits are not loaded or stored at once", ty.bits()));
        }
        let (registers, address) = if store { (1, 0) } else { (0, 1) };
        if s.operands.len() != 2 + hint as usize {
            return Err(format!("{} operands instead of {}", s.operands.len(), 2 + hint as usize));
        }
        let elements = Self::elements(self.operand(s, registers)?);
        if elements.len() != lanes {
            return Err(format!("{} registers for {lanes} elements", elements.len()));
        }
        if store && space == Space::Param {
            return Err("parameters cannot be stored to".into());
        }
        let address = self.address(s, address, space)?;
        let slots = elements.iter().map(|element| self.slot(element, ty, store)).collect::<Decode<Vec<Slot>>>()?;
        let width = ty.bits() as usize / 8;
        let access = Box::new(Access { space, address, width, signed: ty.signed(), strong, slots });
        self.push(if store { Op::Store(access) } else { Op::Load(access) });
        Ok(())
    }

    pub(super) fn atomic(&mut self, old: bool, s: &Statement, m: &mut Mods) -> Decode {
        m.memory_words();
        let hint = m.take("L2::cache_hint");
        let space = m.space()?;
        let lanes = m.vector();
        let op = m.find(|part| {
            Some(match part {
                "add" => AtomicOp::Add,
                "min" => AtomicOp::Min,
                "max" => AtomicOp::Max,
                "inc" => AtomicOp::Inc,
                "dec" => AtomicOp::Dec,
                "and" => AtomicOp::And,
                "or" => AtomicOp::Or,
                "xor" => AtomicOp::Xor,
                "exch" => AtomicOp::Exchange,
                "cas" => AtomicOp::CompareSwap,
                _ => return None,
            })
        });
        let op = op.ok_or("the atomic operation is unknown")?;
        let ty = m.ty()?;
        let kind = match ty {
            Ty::F32 => AtomicType::F32,
            Ty::F64 => AtomicType::F64,
            Ty::F16 => AtomicType::F16,
            Ty::Bf16 => AtomicType::Bf16,
            Ty::F16x2 => AtomicType::F16x2,
            Ty::Bf16x2 => AtomicType::Bf16x2,
            Ty::S(_) => AtomicType::Signed,
            _ => AtomicType::Unsigned,
        };
        let float = !matches!(kind, AtomicType::Signed | AtomicType::Unsigned);
        if (float && !matches!(op, AtomicOp::Add | AtomicOp::Exchange | AtomicOp::Min | AtomicOp::Max))
            || !matches!(ty.bits(), 16 | 32 | 64)
            || ty.bits() as usize * lanes > 256
        {
            return Err("this atomic operation is unknown for its type".into());
        }
        let address = self.address(s, old as usize, space)?;
        let b = Self::elements(self.operand(s, old as usize + 1)?);
        if b.len() != lanes {
            return Err(format!("{} registers for {lanes} elements", b.len()));
        }
        let b = b.iter().map(|b| self.slot(b, ty, true)).collect::<Decode<Vec<Slot>>>()?;
        let c = if op == AtomicOp::CompareSwap {
            let c = self.operand(s, old as usize + 2)?.clone();
            Some(self.slot(&c, ty, true)?)
        } else {
            None
        };
        let olds = if old { Self::elements(self.operand(s, 0)?) } else { Vec::new() };
        let olds = olds.iter().map(|slot| self.slot(slot, ty, false)).collect::<Decode<Vec<Slot>>>()?;
        let expected = old as usize + 2 + c.is_some() as usize + hint as usize;
        if s.operands.len() != expected || (old && olds.len() != lanes) {
            return Err(format!("{} operands instead of {expected}", s.operands.len()));
        }
        let width = ty.bits() as usize / 8;
        self.push(Op::Atomic(Box::new(Atomic { space, address, op, kind, width, old: olds, b, c })));
        Ok(())
    }

    pub(super) fn fence(&mut self, m: &mut Mods) -> Decode {
        if m.take("proxy") {
            let asynchronous = m.find(|part| (part == "async" || part.starts_with("async::")).then_some(()));
            m.find(|part| matches!(part, "global" | "shared::cta" | "shared::cluster").then_some(()));
            if asynchronous.is_some() {
                self.push(Op::ProxyFence);
                return Ok(());
            }
            return match m.take("alias") {
                true => Ok(()),
                false => Err("this proxy fence is unknown".into()),
            };
        }
        if m.take("mbarrier_init") {
            m.take("release");
            m.take("cluster");
            self.push(Op::MbarrierInitFence);
            return Ok(());
        }
        m.memory_words();
        Ok(())
    }

    pub(super) fn shuffle(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") {
            return Err("`shfl` without `.sync` is unknown".into());
        }
        let mode = m.find(|part| {
            Some(match part {
                "up" => ShuffleMode::Up,
                "down" => ShuffleMode::Down,
                "bfly" => ShuffleMode::Butterfly,
                "idx" => ShuffleMode::Index,
                _ => return None,
            })
        });
        let mode = mode.ok_or("the shuffle has no mode")?;
        m.ty()?;
        let (d, p) = self.pair(s, 0)?;
        let d = match d {
            Operand::Sink => self.temp(Class::R32),
            d => self.reg(&d, Class::R32)?.index,
        };
        let p = match p {
            Some(Operand::Sink) | None => None,
            Some(p) => Some(self.reg(&p, Class::Pred)?.index),
        };
        let (a, b, c, mask) = (self.u32_at(s, 1)?, self.u32_at(s, 2)?, self.u32_at(s, 3)?, self.u32_at(s, 4)?);
        self.push(Op::Shuffle(Box::new(Shuffle { mode, d, p, a, b, c, mask })));
        Ok(())
    }

    pub(super) fn vote(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") {
            return Err("`vote` without `.sync` is unknown".into());
        }
        let mode = m.find(|part| {
            Some(match part {
                "all" => VoteMode::All,
                "any" => VoteMode::Any,
                "uni" => VoteMode::Uniform,
                "ballot" => VoteMode::Ballot,
                _ => return None,
            })
        });
        let mode = mode.ok_or("the vote has no mode")?;
        m.ty()?;
        let d = self.dst(s, 0, if mode == VoteMode::Ballot { Class::R32 } else { Class::Pred })?;
        let a = self.operand(s, 1)?.clone();
        let (p, negated) = self.predicate(&a)?;
        let mask = self.u32_at(s, 2)?;
        self.push(Op::Vote(mode, d, p, negated, mask));
        Ok(())
    }

    pub(super) fn match_sync(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let all = m.take("all");
        if !m.take("sync") || (!all && !m.take("any")) {
            return Err("only match.{any,all}.sync is known".into());
        }
        let wide = m.ty()?.bits() == 64;
        let (d, p) = self.pair(s, 0)?;
        let d = self.reg(&d, Class::R32)?.index;
        let p = match p {
            Some(Operand::Sink) | None => None,
            Some(p) => Some(self.reg(&p, Class::Pred)?.index),
        };
        let a = if wide { self.a64(s, 1, Ty::B(64))? } else { self.u32_at(s, 1)? };
        let mask = self.u32_at(s, 2)?;
        self.push(Op::Match { all, wide, d, p, a, mask });
        Ok(())
    }

    pub(super) fn redux(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") {
            return Err("`redux` without `.sync` is unknown".into());
        }
        let name = if m.parts.is_empty() { "" } else { m.parts.remove(0) };
        let op = match (name, m.ty()?.signed()) {
            ("add", _) => ReduxOp::Add,
            ("min", false) => ReduxOp::MinU,
            ("min", true) => ReduxOp::MinS,
            ("max", false) => ReduxOp::MaxU,
            ("max", true) => ReduxOp::MaxS,
            ("and", _) => ReduxOp::And,
            ("or", _) => ReduxOp::Or,
            ("xor", _) => ReduxOp::Xor,
            _ => return Err(format!("unknown modifier `.{name}`")),
        };
        let (d, a, mask) = (self.d32(s)?, self.u32_at(s, 1)?, self.u32_at(s, 2)?);
        self.push(Op::Redux(op, d, a, mask));
        Ok(())
    }

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
        let name = if m.parts.is_empty() { "" } else { m.parts.remove(0) };
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
        self.push(Op::Mbarrier(Box::new(Mbarrier { kind, space, address })));
        Ok(())
    }

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
        let (ca, cg) = (m.take("ca"), m.take("cg"));
        if ca == cg {
            return Err("the copy needs one of `.ca` and `.cg`".into());
        }
        m.memory_words();
        let (to, from) = (m.space()?, m.space()?);
        if (to, from) != (Space::Shared, Space::Global) {
            return Err(format!("copies from {} to {} memory are unknown", from.name(), to.name()));
        }
        if s.operands.len() != 3 {
            return Err(format!("{} operands instead of 3", s.operands.len()));
        }
        let bytes = self.immediate(s, 2)?;
        if !(bytes == 16 || ca && matches!(bytes, 4 | 8)) {
            return Err(format!("a copy of {bytes} bytes: 16, or 4 or 8 with `.ca`"));
        }
        let (shared, global) = (self.address(s, 0, Space::Shared)?, self.address(s, 1, Space::Global)?);
        self.push(Op::AsyncCopy(Box::new(AsyncCopy { shared, global, bytes: bytes as usize })));
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

    pub(super) fn wgmma(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        self.has_wgmma = true;
        let name = if m.parts.is_empty() { "" } else { m.parts.remove(0) };
        if !m.take("sync") || !m.take("aligned") {
            return Err("wgmma needs `.sync.aligned`".into());
        }
        match name {
            "fence" => self.push(Op::WgmmaFence),
            "commit_group" => self.push(Op::WgmmaCommit),
            "wait_group" => {
                let pending = self.immediate(s, 0)? as u32;
                self.push(Op::WgmmaWait(pending));
            }
            "mma_async" => return self.mma(s, m),
            _ => return Err(format!("unknown instruction `wgmma.{name}`")),
        }
        Ok(())
    }

    fn mma(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let shape = if m.parts.is_empty() { "" } else { m.parts.remove(0) };
        let n = shape.strip_prefix("m64n").and_then(|rest| rest.strip_suffix("k16")).and_then(|n| n.parse().ok());
        let Some(n) = n.filter(|n: &usize| (8..=256).contains(n) && n.is_multiple_of(8)) else {
            return Err(format!("shape `{shape}` is unknown: m64nNk16 with N a multiple of 8 up to 256"));
        };
        let types: Vec<&str> = std::mem::take(&mut m.parts);
        let half = match types[..] {
            ["f32", "bf16", "bf16"] => Half::Bf16,
            ["f32", "f16", "f16"] => Half::F16,
            _ => return Err(format!("types `{}` are unknown: f32.bf16.bf16 or f32.f16.f16", types.join("."))),
        };
        let registers = |decoder: &Self, operand: &Operand, count: usize| -> Decode<Vec<R>> {
            let elements = Self::elements(operand);
            if elements.len() != count {
                return Err(format!("{} registers where {count} are needed", elements.len()));
            }
            elements.iter().map(|element| Ok(decoder.reg(element, Class::R32)?.index)).collect()
        };
        let d = registers(self, self.operand(s, 0)?, n / 2)?;
        let a_operand = self.operand(s, 1)?.clone();
        let a = match a_operand {
            Operand::Vector(_) => {
                let r = registers(self, &a_operand, 4)?;
                OperandA::Registers([r[0], r[1], r[2], r[3]])
            }
            _ => OperandA::Descriptor(self.a64(s, 1, Ty::B(64))?),
        };
        let b = self.a64(s, 2, Ty::B(64))?;
        let scale = self.operand(s, 3)?.clone();
        let scale_d = self.predicate(&scale)?;
        let in_registers = matches!(a, OperandA::Registers(_));
        let expected = if in_registers { 7 } else { 8 };
        if s.operands.len() != expected {
            return Err(format!("{} operands instead of {expected}", s.operands.len()));
        }
        let sign = |i| match self.immediate(s, i)? {
            1 => Ok(false),
            -1 => Ok(true),
            other => Err(format!("operand {} is {other}: it must be 1 or -1", i + 1)),
        };
        let flag = |i| match self.immediate(s, i)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("operand {} is {other}: it must be 0 or 1", i + 1)),
        };
        let (negate_a, negate_b) = (sign(4)?, sign(5)?);
        let (transpose_a, transpose_b) = if in_registers { (false, flag(6)?) } else { (flag(6)?, flag(7)?) };
        self.push(Op::Wgmma(Box::new(Wgmma {
            half,
            n,
            d,
            a,
            b,
            scale_d,
            negate_a,
            negate_b,
            transpose_a,
            transpose_b,
        })));
        Ok(())
    }

    pub(super) fn matrix(&mut self, store: bool, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") || !m.take("aligned") || !m.take("m8n8") || !m.take("b16") {
            return Err("only .sync.aligned.m8n8 matrices of .b16 are known".into());
        }
        let count = m.find(|part| match part {
            "x1" => Some(1),
            "x2" => Some(2),
            "x4" => Some(4),
            _ => None,
        });
        let count = count.ok_or("the number of matrices is missing")?;
        let transpose = m.take("trans");
        let space = m.space()?;
        let (registers, at) = if store { (1, 0) } else { (0, 1) };
        let elements = Self::elements(self.operand(s, registers)?);
        if elements.len() != count {
            return Err(format!("{} registers for {count} matrices", elements.len()));
        }
        let registers =
            elements.iter().map(|element| Ok(self.reg(element, Class::R32)?.index)).collect::<Decode<Vec<R>>>()?;
        let address = self.address(s, at, space)?;
        self.push(Op::Matrix(Box::new(Matrix { space, address, registers, transpose, store })));
        Ok(())
    }
}
