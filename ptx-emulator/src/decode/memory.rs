//! Loads, stores, atomics, fences and address conversions.

use super::{Decode, Decoder, Mods, Ty};
use crate::alu::{Binary64, Unary64};
use crate::isa::*;
use crate::parse::Statement;

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
        let access = Box::new(LoadStore { space, address, width, signed: ty.signed(), strong, slots });
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
}
