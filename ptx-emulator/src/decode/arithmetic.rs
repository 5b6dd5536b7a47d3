//! Moves, integer and floating-point arithmetic, bits, comparisons and selections.

use super::{Decode, Decoder, Mods, Ty};
use crate::alu::*;
use crate::float::Round;
use crate::isa::*;
use crate::parse::{Class, Operand, Statement};

impl Decoder<'_> {
    pub(super) fn mov(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let ty = m.ty()?;
        let (d, a) = (self.operand(s, 0)?.clone(), self.operand(s, 1)?.clone());
        match (&d, &a) {
            (d, Operand::Vector(parts)) => self.pack(ty, d, parts),
            (Operand::Vector(parts), a) => self.unpack(ty, parts, a),
            _ if ty == Ty::Pred => {
                let d = self.dst(s, 0, Class::Pred)?;
                let (p, negated) = self.predicate(&a)?;
                self.push(Op::Pred(if negated { PredOp::Not } else { PredOp::Mov }, d, p, p));
                Ok(())
            }
            _ if ty.bits() == 64 => {
                let d = self.d64(s)?;
                if let Operand::Name(name, _) = &a {
                    match name.as_str() {
                        "%clock64" | "%globaltimer" => {
                            self.push(Op::Clock(d));
                            return Ok(());
                        }
                        "%gridid" => {
                            let zero = self.const64(0);
                            self.push(Op::Unary64(Unary64::Mov, d, zero));
                            return Ok(());
                        }
                        _ => {}
                    }
                }
                let a = self.read64(&a, ty)?;
                self.push(Op::Unary64(Unary64::Mov, d, a));
                Ok(())
            }
            _ => {
                let d = self.d32(s)?;
                if let Operand::Name(name, _) = &a {
                    let part = match name.as_str() {
                        "%clock" | "%globaltimer_lo" => Some(Narrow::Low),
                        "%clock_hi" | "%globaltimer_hi" => Some(Narrow::High),
                        _ => None,
                    };
                    if let Some(part) = part {
                        let wide = self.temp(Class::R64);
                        self.push(Op::Clock(wide));
                        self.push(Op::Narrow(part, d, wide));
                        return Ok(());
                    }
                }
                let a = self.read32(&a, ty)?;
                self.push(Op::Unary32(Unary32::Mov, d, a));
                Ok(())
            }
        }
    }

    /// `mov.b64 d, {a, b}`: the first element goes to the lowest bits.
    fn pack(&mut self, ty: Ty, d: &Operand, parts: &[Operand]) -> Decode {
        match (ty.bits(), parts.len()) {
            (32, 2) => {
                let (a, b) = (self.read32(&parts[0], Ty::B(16))?, self.read32(&parts[1], Ty::B(16))?);
                let d = self.reg(d, Class::R32)?.index;
                self.push(Op::Binary32(Binary32::Pack16, d, a, b));
            }
            (64, 2) => {
                let (a, b) = (self.read32(&parts[0], Ty::B(32))?, self.read32(&parts[1], Ty::B(32))?);
                let d = self.reg(d, Class::R64)?.index;
                self.push(Op::WideMul(WideMul::Pack, d, a, b));
            }
            (64, 4) => {
                let halves = [self.temp(Class::R32), self.temp(Class::R32)];
                for (half, pair) in halves.iter().zip(parts.chunks(2)) {
                    let (a, b) = (self.read32(&pair[0], Ty::B(16))?, self.read32(&pair[1], Ty::B(16))?);
                    self.push(Op::Binary32(Binary32::Pack16, *half, a, b));
                }
                let d = self.reg(d, Class::R64)?.index;
                self.push(Op::WideMul(WideMul::Pack, d, halves[0], halves[1]));
            }
            (bits, count) => return Err(format!("{count} elements do not pack into {bits} bits")),
        }
        Ok(())
    }

    /// `mov.b64 {a, b}, c`. The words are read first, because an element may be the source itself.
    fn unpack(&mut self, ty: Ty, parts: &[Operand], a: &Operand) -> Decode {
        let mut words = Vec::new();
        match (ty.bits(), parts.len()) {
            (32, 2) => words.push(self.read32(a, ty)?),
            (64, 2 | 4) => {
                let wide = self.read64(a, ty)?;
                for part in [Narrow::Low, Narrow::High] {
                    let word = self.temp(Class::R32);
                    self.push(Op::Narrow(part, word, wide));
                    words.push(word);
                }
            }
            (bits, count) => return Err(format!("{bits} bits do not unpack into {count} elements")),
        }
        let sixteen = words.len() != parts.len();
        let shift = self.const32(16);
        let mut moves = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            if *part == Operand::Sink {
                continue;
            }
            let d = self.reg(part, Class::R32)?.index;
            if !sixteen {
                moves.push(Op::Unary32(Unary32::Mov, d, words[i]));
            } else if i % 2 == 1 {
                moves.push(Op::Binary32(Binary32::ShrU, d, words[i / 2], shift));
            } else {
                moves.push(Op::Unary32(Unary32::Zext16, d, words[i / 2]));
            }
        }
        // Two moves read the source of a 32-bit unpack. Both write registers of 16 bits, so neither
        // overwrites it.
        moves.into_iter().for_each(|op| self.push(op));
        Ok(())
    }

    pub(super) fn un32(&mut self, op: Unary32, s: &Statement, ty: Ty) -> Decode {
        let (d, a) = (self.d32(s)?, self.a32(s, 1, ty)?);
        self.push(Op::Unary32(op, d, a));
        Ok(())
    }

    pub(super) fn un64(&mut self, op: Unary64, s: &Statement, ty: Ty) -> Decode {
        let (d, a) = (self.d64(s)?, self.a64(s, 1, ty)?);
        self.push(Op::Unary64(op, d, a));
        Ok(())
    }

    pub(super) fn bin32(&mut self, op: Binary32, s: &Statement, ty: Ty) -> Decode {
        let (d, a, b) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?);
        self.push(Op::Binary32(op, d, a, b));
        Ok(())
    }

    fn bin64(&mut self, op: Binary64, s: &Statement, ty: Ty) -> Decode {
        let (d, a, b) = (self.d64(s)?, self.a64(s, 1, ty)?, self.a64(s, 2, ty)?);
        self.push(Op::Binary64(op, d, a, b));
        Ok(())
    }

    /// A register with the value of another, whose subnormals are flushed to zero.
    fn flushed(&mut self, r: R) -> R {
        let out = self.temp(Class::R32);
        self.push(Op::Unary32(Unary32::FlushF32, out, r));
        out
    }

    /// Arithmetic on f32 with another rounding than to nearest. With `ftz`, operands and result are
    /// flushed.
    pub(super) fn directed(
        &mut self,
        kind: Directed,
        round: Round,
        ftz: bool,
        s: &Statement,
        sources: usize,
    ) -> Decode {
        let d = self.d32(s)?;
        let zero = self.const32(0);
        let mut inputs = [zero; 3];
        for (i, input) in inputs.iter_mut().enumerate().take(sources) {
            *input = self.a32(s, i + 1, Ty::F32)?;
            if ftz {
                *input = self.flushed(*input);
            }
        }
        self.push(Op::Directed(kind, round, d, inputs));
        if ftz {
            self.push(Op::Unary32(Unary32::FlushF32, d, d));
        }
        Ok(())
    }

    pub(super) fn binary(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        use Binary32 as B;
        use Binary64 as B64;
        let round = m.rounding();
        let (ftz, saturate, nan) = (m.take("ftz"), m.take("sat"), m.take("NaN"));
        if matches!(root, "add" | "sub") && m.take("cc") {
            return self.carry(s, root == "sub", false, m).and_then(|()| self.no_modifiers(ftz, saturate, nan));
        }
        let (wide, hi) = (m.take("wide"), m.take("hi"));
        let _low = m.take("lo");
        let approximate = m.take("approx") | m.take("full");
        let ty = m.ty()?;
        if approximate && (root, ty) != ("div", Ty::F32) {
            return Err(format!("`.approx` and `.full` are unknown for {root}"));
        }
        if (nan && !matches!(root, "min" | "max")) || ((wide || hi) && !matches!(root, "mul" | "mul24")) {
            return Err(format!("`.NaN`, `.wide` or `.hi` is unknown for {root}"));
        }
        let directed = round.filter(|round| *round != Round::Nearest);
        if ty == Ty::F32
            && let Some(round) = directed
        {
            let kind = match root {
                "add" => Directed::Add,
                "sub" => Directed::Sub,
                "mul" => Directed::Mul,
                "div" => Directed::Div,
                _ => return Err(format!("{root} does not round")),
            };
            self.directed(kind, round, ftz, s, 2)?;
            return self.saturate(s, saturate);
        }
        if directed.is_some() {
            return Err("directed rounding is known for f32 only".into());
        }
        let signed = ty.signed();
        if ty == Ty::Pred {
            let op = match root {
                "and" => PredOp::And,
                "or" => PredOp::Or,
                "xor" => PredOp::Xor,
                _ => return Err(format!("{root} of predicates is unknown")),
            };
            let (a, b) = (self.operand(s, 1)?.clone(), self.operand(s, 2)?.clone());
            let (d, a, b) = (self.dst(s, 0, Class::Pred)?, self.plain_predicate(&a)?, self.plain_predicate(&b)?);
            self.push(Op::Pred(op, d, a, b));
            return Ok(());
        }
        if wide {
            return match ty.bits() {
                16 => self.bin32(if signed { B::MulWideS16 } else { B::Mul }, s, ty),
                32 => {
                    let (d, a, b) = (self.d64(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?);
                    self.push(Op::WideMul(if signed { WideMul::MulS } else { WideMul::MulU }, d, a, b));
                    Ok(())
                }
                bits => Err(format!("mul.wide of {bits} bits is unknown")),
            };
        }
        if matches!(root, "shl" | "shr") {
            let (right, bits) = (root == "shr", ty.bits());
            if bits == 64 {
                let (d, a, b) = (self.d64(s)?, self.a64(s, 1, ty)?, self.u32_at(s, 2)?);
                let op = if !right { Shift64::Shl } else { if signed { Shift64::ShrS } else { Shift64::ShrU } };
                self.push(Op::Shift64(op, d, a, b));
                return Ok(());
            }
            let op = match (right, signed, bits) {
                (false, _, 32) => B::Shl,
                (false, _, 16) => B::Shl16,
                (true, false, 16 | 32) => B::ShrU,
                (true, true, 32) => B::ShrS,
                (true, true, 16) => B::ShrS16,
                _ => return Err(format!("shifts of {bits} bits are unknown")),
            };
            let (d, a, b) = (self.d32(s)?, self.a32(s, 1, ty)?, self.u32_at(s, 2)?);
            self.push(Op::Binary32(op, d, a, b));
            return Ok(());
        }
        let unknown = || Err(format!("{root} of this type is unknown"));
        if ty.integer() && ty.bits() == 64 {
            self.no_modifiers(ftz, saturate, nan)?;
            let op = match (root, signed) {
                ("add", _) => B64::Add,
                ("sub", _) => B64::Sub,
                ("mul", false) if hi => B64::MulHiU,
                ("mul", true) if hi => B64::MulHiS,
                ("mul", _) => B64::Mul,
                ("div", false) => B64::DivU,
                ("div", true) => B64::DivS,
                ("rem", false) => B64::RemU,
                ("rem", true) => B64::RemS,
                ("min", false) => B64::MinU,
                ("min", true) => B64::MinS,
                ("max", false) => B64::MaxU,
                ("max", true) => B64::MaxS,
                ("and", _) => B64::And,
                ("or", _) => B64::Or,
                ("xor", _) => B64::Xor,
                _ => return unknown(),
            };
            return self.bin64(op, s, ty);
        }
        if ty == Ty::F64 {
            self.no_modifiers(ftz, saturate, nan)?;
            let op = match root {
                "add" => B64::AddF64,
                "sub" => B64::SubF64,
                "mul" => B64::MulF64,
                "div" => B64::DivF64,
                "min" => B64::MinF64,
                "max" => B64::MaxF64,
                "copysign" => B64::CopysignF64,
                _ => return unknown(),
            };
            return self.bin64(op, s, ty);
        }
        let sixteen = ty.bits() == 16;
        let op = match (root, ty) {
            ("add", Ty::S(32)) if saturate => B::AddSat,
            ("sub", Ty::S(32)) if saturate => B::SubSat,
            (_, Ty::B(_) | Ty::U(_) | Ty::S(_)) => {
                self.no_modifiers(ftz, saturate, nan)?;
                match (root, signed, sixteen) {
                    ("add", _, false) => B::Add,
                    ("add", _, true) => B::Add16,
                    ("sub", _, false) => B::Sub,
                    ("sub", _, true) => B::Sub16,
                    ("mul", false, false) if hi => B::MulHiU,
                    ("mul", true, false) if hi => B::MulHiS,
                    ("mul", false, true) if hi => B::MulHiU16,
                    ("mul", true, true) if hi => B::MulHiS16,
                    ("mul", _, false) => B::Mul,
                    ("mul", _, true) => B::Mul16,
                    ("mul24", false, false) if !hi => B::Mul24U,
                    ("mul24", true, false) if !hi => B::Mul24S,
                    ("div", false, _) => B::DivU,
                    ("div", true, false) => B::DivS,
                    ("div", true, true) => B::DivS16,
                    ("rem", false, _) => B::RemU,
                    ("rem", true, false) => B::RemS,
                    ("rem", true, true) => B::RemS16,
                    ("min", false, _) => B::MinU,
                    ("min", true, false) => B::MinS,
                    ("min", true, true) => B::MinS16,
                    ("max", false, _) => B::MaxU,
                    ("max", true, false) => B::MaxS,
                    ("max", true, true) => B::MaxS16,
                    ("and", ..) => B::And,
                    ("or", ..) => B::Or,
                    ("xor", ..) => B::Xor,
                    _ => return unknown(),
                }
            }
            ("add", Ty::F32) => {
                if ftz {
                    B::AddFtzF32
                } else {
                    B::AddF32
                }
            }
            ("sub", Ty::F32) => {
                if ftz {
                    B::SubFtzF32
                } else {
                    B::SubF32
                }
            }
            ("mul", Ty::F32) => {
                if ftz {
                    B::MulFtzF32
                } else {
                    B::MulF32
                }
            }
            ("div", Ty::F32) => B::DivF32,
            ("min", Ty::F32) => {
                if nan {
                    B::MinNanF32
                } else {
                    B::MinF32
                }
            }
            ("max", Ty::F32) => {
                if nan {
                    B::MaxNanF32
                } else {
                    B::MaxF32
                }
            }
            ("copysign", Ty::F32) => B::CopysignF32,
            ("add", Ty::F16) => B::AddF16,
            ("sub", Ty::F16) => B::SubF16,
            ("mul", Ty::F16) => B::MulF16,
            ("min", Ty::F16) => {
                if nan {
                    B::MinNanF16
                } else {
                    B::MinF16
                }
            }
            ("max", Ty::F16) => {
                if nan {
                    B::MaxNanF16
                } else {
                    B::MaxF16
                }
            }
            ("add", Ty::Bf16) => B::AddBf16,
            ("sub", Ty::Bf16) => B::SubBf16,
            ("mul", Ty::Bf16) => B::MulBf16,
            ("min", Ty::Bf16) => {
                if nan {
                    B::MinNanBf16
                } else {
                    B::MinBf16
                }
            }
            ("max", Ty::Bf16) => {
                if nan {
                    B::MaxNanBf16
                } else {
                    B::MaxBf16
                }
            }
            ("add", Ty::F16x2) => B::AddF16x2,
            ("sub", Ty::F16x2) => B::SubF16x2,
            ("mul", Ty::F16x2) => B::MulF16x2,
            ("min", Ty::F16x2) => {
                if nan {
                    B::MinNanF16x2
                } else {
                    B::MinF16x2
                }
            }
            ("max", Ty::F16x2) => {
                if nan {
                    B::MaxNanF16x2
                } else {
                    B::MaxF16x2
                }
            }
            ("add", Ty::Bf16x2) => B::AddBf16x2,
            ("sub", Ty::Bf16x2) => B::SubBf16x2,
            ("mul", Ty::Bf16x2) => B::MulBf16x2,
            ("min", Ty::Bf16x2) => {
                if nan {
                    B::MinNanBf16x2
                } else {
                    B::MinBf16x2
                }
            }
            ("max", Ty::Bf16x2) => {
                if nan {
                    B::MaxNanBf16x2
                } else {
                    B::MaxBf16x2
                }
            }
            _ => return unknown(),
        };
        if ty == Ty::F32 && ftz && matches!(root, "div" | "min" | "max") {
            let (d, a, b) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?);
            let (a, b) = (self.flushed(a), self.flushed(b));
            self.push(Op::Binary32(op, d, a, b));
            self.push(Op::Unary32(Unary32::FlushF32, d, d));
            return self.saturate(s, saturate);
        }
        if ftz && ty != Ty::F32 {
            return Err("`.ftz` is known for f32 only".into());
        }
        self.bin32(op, s, ty)?;
        self.saturate(s, saturate && ty == Ty::F32)?;
        self.no_modifiers(false, saturate && !matches!(ty, Ty::F32 | Ty::S(32)), false)
    }

    /// Fails if a modifier was taken that the instruction does not have.
    fn no_modifiers(&self, ftz: bool, saturate: bool, nan: bool) -> Decode {
        if ftz || saturate || nan {
            return Err("`.ftz`, `.sat` or `.NaN` is unknown for this type".into());
        }
        Ok(())
    }

    /// `.sat` of f32: clamps the result to [0, 1].
    pub(super) fn saturate(&mut self, s: &Statement, saturate: bool) -> Decode {
        if saturate {
            let d = self.d32(s)?;
            self.push(Op::Unary32(Unary32::SatF32, d, d));
        }
        Ok(())
    }

    pub(super) fn carry(&mut self, s: &Statement, subtract: bool, read: bool, m: &mut Mods) -> Decode {
        let write = !read || m.take("cc");
        let ty = m.ty()?;
        let carry = match self.carry {
            Some(carry) => carry,
            None => self.temp(Class::Pred),
        };
        self.carry = Some(carry);
        let wide = ty.bits() == 64;
        let (d, a, b) = if wide {
            (self.d64(s)?, self.a64(s, 1, ty)?, self.a64(s, 2, ty)?)
        } else {
            (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?)
        };
        self.push(Op::Carry { wide, subtract, d, a, b, carry, read, write });
        Ok(())
    }

    pub(super) fn ternary(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        use Ternary32 as T;
        let round = m.rounding();
        let (ftz, saturate, relu) = (m.take("ftz"), m.take("sat"), m.take("relu"));
        let (wide, hi, _low) = (m.take("wide"), m.take("hi"), m.take("lo"));
        let ty = m.ty()?;
        if root == "dp4a" {
            // The operations do not tell the two types apart.
            m.ty()?;
        }
        let signed = ty.signed();
        if wide && ty.bits() == 32 {
            let (d, a, b, c) = (self.d64(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?, self.a64(s, 3, Ty::B(64))?);
            self.push(Op::WideMad(if signed { WideMad::MadS } else { WideMad::MadU }, d, a, b, c));
            return Ok(());
        }
        if ty.bits() == 64 {
            let op = match (root, ty, signed) {
                ("mad" | "fma", Ty::F64, _) if round.is_none_or(|round| round == Round::Nearest) => Ternary64::FmaF64,
                ("mad", Ty::F64, _) | ("fma", ..) => return Err("only round to nearest is known for f64".into()),
                ("mad", _, false) if hi => Ternary64::MadHiU,
                ("mad", _, true) if hi => Ternary64::MadHiS,
                ("mad", ..) => Ternary64::Mad,
                _ => return Err(format!("{root} of this type is unknown")),
            };
            let (d, a, b, c) = (self.d64(s)?, self.a64(s, 1, ty)?, self.a64(s, 2, ty)?, self.a64(s, 3, ty)?);
            self.push(Op::Ternary64(op, d, a, b, c));
            return Ok(());
        }
        if ty == Ty::F32
            && let Some(round) = round.filter(|round| *round != Round::Nearest)
        {
            self.directed(Directed::Fma, round, ftz, s, 3)?;
            return self.saturate(s, saturate);
        }
        let op = match (root, ty) {
            ("fma" | "mad", Ty::F32) => {
                if ftz {
                    T::FmaFtzF32
                } else {
                    T::FmaF32
                }
            }
            ("fma", Ty::F16) => T::FmaF16,
            ("fma", Ty::Bf16) => T::FmaBf16,
            ("fma", Ty::F16x2) => T::FmaF16x2,
            ("fma", Ty::Bf16x2) => T::FmaBf16x2,
            ("mad", _) if ty.integer() => match (ty.bits(), signed, wide, hi) {
                (16, false, true, _) => T::MadWideU16,
                (16, true, true, _) => T::MadWideS16,
                (16, _, false, false) => T::Mad16,
                (32, false, _, true) => T::MadHiU,
                (32, true, _, true) => T::MadHiS,
                (32, ..) => T::Mad,
                _ => return Err("this form of mad is unknown".into()),
            },
            ("mad24", Ty::U(32)) if !hi => T::Mad24U,
            ("mad24", Ty::S(32)) if !hi => T::Mad24S,
            ("sad", Ty::U(32)) => T::SadU,
            ("sad", Ty::S(32)) => T::SadS,
            ("dp4a", Ty::U(32)) => T::Dp4aU,
            ("dp4a", Ty::S(32)) => T::Dp4aS,
            _ => return Err(format!("{root} of this type is unknown")),
        };
        if (ftz || saturate) && ty != Ty::F32 {
            return Err("`.ftz` and `.sat` are known for f32 only".into());
        }
        let c_type = if wide { Ty::B(32) } else { ty };
        let (d, a, b, c) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?, self.a32(s, 3, c_type)?);
        self.push(Op::Ternary32(op, d, a, b, c));
        if relu {
            let op = match ty {
                Ty::F16 => Unary32::ReluF16,
                Ty::Bf16 => Unary32::ReluBf16,
                _ => return Err("`.relu` is known for f16 and bf16 only".into()),
            };
            self.push(Op::Unary32(op, d, d));
        }
        self.saturate(s, saturate)
    }

    pub(super) fn unary(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        use Unary32 as U;
        use Unary64 as U64;
        let round = m.rounding();
        let (ftz, approximate) = (m.take("ftz"), m.take("approx"));
        let ty = m.ty()?;
        let unknown = || Err(format!("{root} of this type is unknown"));
        if root == "not" && ty == Ty::Pred {
            let a = self.operand(s, 1)?.clone();
            let d = self.dst(s, 0, Class::Pred)?;
            let (p, negated) = self.predicate(&a)?;
            self.push(Op::Pred(if negated { PredOp::Mov } else { PredOp::Not }, d, p, p));
            return Ok(());
        }
        if ty.bits() == 64 {
            if matches!(root, "popc" | "clz") {
                let (d, a) = (self.d32(s)?, self.a64(s, 1, ty)?);
                self.push(Op::Narrow(if root == "popc" { Narrow::Popc } else { Narrow::Clz }, d, a));
                return Ok(());
            }
            let op = match (root, ty == Ty::F64) {
                ("abs", true) => U64::AbsF64,
                ("neg", true) => U64::NegF64,
                ("rcp", true) => U64::RcpF64,
                ("sqrt", true) => U64::SqrtF64,
                ("rsqrt", true) => U64::RsqrtF64,
                ("abs", false) => U64::Abs,
                ("neg", false) => U64::Neg,
                ("not", false) => U64::Not,
                ("cnot", false) => U64::Cnot,
                ("brev", false) => U64::Brev,
                _ => return unknown(),
            };
            if round.is_some_and(|round| round != Round::Nearest) {
                return Err("only round to nearest is known for f64".into());
            }
            return self.un64(op, s, ty);
        }
        if let (Ty::F32, Some(round), false) = (ty, round.filter(|round| *round != Round::Nearest), approximate) {
            let kind = match root {
                "rcp" => Directed::Rcp,
                "sqrt" => Directed::Sqrt,
                _ => return unknown(),
            };
            return self.directed(kind, round, ftz, s, 1);
        }
        let op = match (root, ty) {
            ("abs", Ty::F32) => U::AbsF32,
            ("neg", Ty::F32) => U::NegF32,
            ("rcp", Ty::F32) => U::RcpF32,
            ("sqrt", Ty::F32) => U::SqrtF32,
            ("rsqrt", Ty::F32) => U::RsqrtF32,
            ("ex2", Ty::F32) if ftz => U::Ex2FtzF32,
            ("ex2", Ty::F32) => U::Ex2F32,
            ("lg2", Ty::F32) => U::Lg2F32,
            ("sin", Ty::F32) => U::SinF32,
            ("cos", Ty::F32) => U::CosF32,
            ("tanh", Ty::F32) => U::TanhF32,
            ("abs", Ty::F16 | Ty::Bf16) => U::AbsF16,
            ("neg", Ty::F16 | Ty::Bf16) => U::NegF16,
            ("abs", Ty::F16x2 | Ty::Bf16x2) => U::AbsX2,
            ("neg", Ty::F16x2 | Ty::Bf16x2) => U::NegX2,
            ("ex2", Ty::F16) => U::Ex2F16,
            ("ex2", Ty::Bf16) => U::Ex2Bf16,
            ("ex2", Ty::F16x2) => U::Ex2F16x2,
            ("ex2", Ty::Bf16x2) => U::Ex2Bf16x2,
            ("tanh", Ty::F16) => U::TanhF16,
            ("tanh", Ty::Bf16) => U::TanhBf16,
            ("tanh", Ty::F16x2) => U::TanhF16x2,
            ("tanh", Ty::Bf16x2) => U::TanhBf16x2,
            ("abs", Ty::S(32)) => U::Abs,
            ("abs", Ty::S(16)) => U::Abs16,
            ("neg", Ty::S(32)) => U::Neg,
            ("neg", Ty::S(16)) => U::Neg16,
            ("not", Ty::B(32)) => U::Not,
            ("not", Ty::B(16)) => U::Not16,
            ("cnot", Ty::B(16 | 32)) => U::Cnot,
            ("brev", Ty::B(32)) => U::Brev,
            ("popc", Ty::B(32)) => U::Popc,
            ("clz", Ty::B(32)) => U::Clz,
            _ => return unknown(),
        };
        if !ftz || ty != Ty::F32 || root == "ex2" {
            return self.un32(op, s, ty);
        }
        let (d, a) = (self.d32(s)?, self.a32(s, 1, ty)?);
        let a = self.flushed(a);
        self.push(Op::Unary32(op, d, a));
        self.push(Op::Unary32(U::FlushF32, d, d));
        Ok(())
    }

    pub(super) fn bits(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        match root {
            "bfind" => {
                let shift = m.take("shiftamt");
                let ty = m.ty()?;
                match (ty.bits(), ty.signed(), shift) {
                    (32, false, false) => self.un32(Unary32::BfindU, s, ty),
                    (32, true, false) => self.un32(Unary32::BfindS, s, ty),
                    (32, false, true) => self.un32(Unary32::BfindShiftU, s, ty),
                    (32, true, true) => self.un32(Unary32::BfindShiftS, s, ty),
                    (64, signed, false) => {
                        let (d, a) = (self.d32(s)?, self.a64(s, 1, ty)?);
                        self.push(Op::Narrow(if signed { Narrow::BfindS } else { Narrow::BfindU }, d, a));
                        Ok(())
                    }
                    _ => Err("this form of bfind is unknown".into()),
                }
            }
            "bfe" => {
                let ty = m.ty()?;
                let (position, length) = (self.u32_at(s, 2)?, self.u32_at(s, 3)?);
                if ty.bits() == 64 {
                    let (d, a) = (self.d64(s)?, self.a64(s, 1, ty)?);
                    let op = if ty.signed() { WideMad::BfeS } else { WideMad::BfeU };
                    self.push(Op::WideMad(op, d, position, length, a));
                } else {
                    let (d, a) = (self.d32(s)?, self.a32(s, 1, ty)?);
                    let op = if ty.signed() { Ternary32::BfeS } else { Ternary32::BfeU };
                    self.push(Op::Ternary32(op, d, a, position, length));
                }
                Ok(())
            }
            "bfi" => {
                let ty = m.ty()?;
                let (position, length) = (self.u32_at(s, 3)?, self.u32_at(s, 4)?);
                if ty.bits() == 64 {
                    let (d, a, b) = (self.d64(s)?, self.a64(s, 1, ty)?, self.a64(s, 2, ty)?);
                    self.push(Op::Insert64(d, [a, b, position, length]));
                } else {
                    let (d, a, b) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?);
                    self.push(Op::Insert32(d, [a, b, position, length]));
                }
                Ok(())
            }
            "shf" => {
                let (left, clamp) = (m.take("l"), m.take("clamp"));
                let (right, wrap) = (m.take("r"), m.take("wrap"));
                let ty = m.ty()?;
                let op = match (left, right, clamp, wrap) {
                    (true, false, true, false) => Ternary32::ShfLClamp,
                    (true, false, false, true) => Ternary32::ShfLWrap,
                    (false, true, true, false) => Ternary32::ShfRClamp,
                    (false, true, false, true) => Ternary32::ShfRWrap,
                    _ => return Err("shf needs .l or .r and .clamp or .wrap".into()),
                };
                let (d, a, b, c) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?, self.u32_at(s, 3)?);
                self.push(Op::Ternary32(op, d, a, b, c));
                Ok(())
            }
            "prmt" => {
                let ty = m.ty()?;
                let op = m
                    .find(|part| {
                        Some(match part {
                            "f4e" => Ternary32::PrmtF4e,
                            "b4e" => Ternary32::PrmtB4e,
                            "rc8" => Ternary32::PrmtRc8,
                            "ecl" => Ternary32::PrmtEcl,
                            "ecr" => Ternary32::PrmtEcr,
                            "rc16" => Ternary32::PrmtRc16,
                            _ => return None,
                        })
                    })
                    .unwrap_or(Ternary32::Prmt);
                let (d, a, b, c) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?, self.u32_at(s, 3)?);
                self.push(Op::Ternary32(op, d, a, b, c));
                Ok(())
            }
            "lop3" => {
                let ty = m.ty()?;
                let table = self.immediate(s, 4)?;
                let sources = [self.a32(s, 1, ty)?, self.a32(s, 2, ty)?, self.a32(s, 3, ty)?];
                let d = self.d32(s)?;
                self.push(Op::Lop3(table as u8, d, sources));
                Ok(())
            }
            "bmsk" => {
                if !m.take("clamp") {
                    return Err("only bmsk.clamp is known".into());
                }
                let ty = m.ty()?;
                self.bin32(Binary32::Bmsk, s, ty)
            }
            _ => Err(format!("unknown instruction `{root}`")),
        }
    }

    /// A new predicate that holds the result of a comparison.
    fn comparison(&mut self, name: &str, ty: Ty, ftz: bool, a: &Operand, b: &Operand) -> Decode<R> {
        let p = self.temp(Class::Pred);
        let float = matches!(ty, Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::F64);
        if ty.bits() == 64 {
            let (a, b) = (self.read64(a, ty)?, self.read64(b, ty)?);
            use Compare64 as C;
            let op = match (name, float, ty.signed()) {
                ("eq", false, _) => C::Eq,
                ("ne", false, _) => C::Ne,
                ("lt" | "lo", false, false) => C::LtU,
                ("le" | "ls", false, false) => C::LeU,
                ("gt" | "hi", false, false) => C::GtU,
                ("ge" | "hs", false, false) => C::GeU,
                ("lt", false, true) => C::LtS,
                ("le", false, true) => C::LeS,
                ("gt", false, true) => C::GtS,
                ("ge", false, true) => C::GeS,
                ("eq", true, _) => C::FEq,
                ("ne", true, _) => C::FNe,
                ("lt", true, _) => C::FLt,
                ("le", true, _) => C::FLe,
                ("gt", true, _) => C::FGt,
                ("ge", true, _) => C::FGe,
                ("equ", true, _) => C::FEqU,
                ("neu", true, _) => C::FNeU,
                ("ltu", true, _) => C::FLtU,
                ("leu", true, _) => C::FLeU,
                ("gtu", true, _) => C::FGtU,
                ("geu", true, _) => C::FGeU,
                ("num", true, _) => C::FNum,
                ("nan", true, _) => C::FNan,
                _ => return Err(format!("comparison `{name}` is unknown for this type")),
            };
            self.push(Op::Compare64(op, p, a, b));
            return Ok(p);
        }
        let (mut a, mut b) = (self.read32(a, ty)?, self.read32(b, ty)?);
        let prepare = match ty {
            Ty::F16 => Some(Unary32::F16ToF32),
            Ty::Bf16 => Some(Unary32::Bf16ToF32),
            Ty::F32 if ftz => Some(Unary32::FlushF32),
            Ty::F16x2 | Ty::Bf16x2 => return Err("comparisons of packed halves are unknown".into()),
            _ => None,
        };
        if let Some(op) = prepare {
            for r in [&mut a, &mut b] {
                let out = self.temp(Class::R32);
                self.push(Op::Unary32(op, out, *r));
                *r = out;
            }
        }
        use Compare32 as C;
        let op = match (name, float, ty.signed(), ty.bits()) {
            ("eq", false, ..) => C::Eq,
            ("ne", false, ..) => C::Ne,
            ("lt" | "lo", false, false, _) => C::LtU,
            ("le" | "ls", false, false, _) => C::LeU,
            ("gt" | "hi", false, false, _) => C::GtU,
            ("ge" | "hs", false, false, _) => C::GeU,
            ("lt", false, true, 32) => C::LtS,
            ("le", false, true, 32) => C::LeS,
            ("gt", false, true, 32) => C::GtS,
            ("ge", false, true, 32) => C::GeS,
            ("lt", false, true, 16) => C::LtS16,
            ("le", false, true, 16) => C::LeS16,
            ("gt", false, true, 16) => C::GtS16,
            ("ge", false, true, 16) => C::GeS16,
            ("eq", true, ..) => C::FEq,
            ("ne", true, ..) => C::FNe,
            ("lt", true, ..) => C::FLt,
            ("le", true, ..) => C::FLe,
            ("gt", true, ..) => C::FGt,
            ("ge", true, ..) => C::FGe,
            ("equ", true, ..) => C::FEqU,
            ("neu", true, ..) => C::FNeU,
            ("ltu", true, ..) => C::FLtU,
            ("leu", true, ..) => C::FLeU,
            ("gtu", true, ..) => C::FGtU,
            ("geu", true, ..) => C::FGeU,
            ("num", true, ..) => C::FNum,
            ("nan", true, ..) => C::FNan,
            _ => return Err(format!("comparison `{name}` is unknown for this type")),
        };
        self.push(Op::Compare32(op, p, a, b));
        Ok(p)
    }

    pub(super) fn compare(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        let ftz = m.take("ftz");
        let name = m.first();
        let combine = m.find(|part| match part {
            "and" => Some(PredOp::And),
            "or" => Some(PredOp::Or),
            "xor" => Some(PredOp::Xor),
            _ => None,
        });
        let result = if root == "set" { Some(m.ty()?) } else { None };
        let ty = m.ty()?;
        let (a, b) = (self.operand(s, 1)?.clone(), self.operand(s, 2)?.clone());
        let p = self.comparison(name, ty, ftz, &a, &b)?;
        let other = match combine {
            Some(_) => {
                let c = self.operand(s, 3)?.clone();
                Some(self.plain_predicate(&c)?)
            }
            None => None,
        };
        let combined = |decoder: &mut Self, p: R, d: R| match (combine, other) {
            (Some(op), Some(c)) => decoder.push(Op::Pred(op, d, p, c)),
            _ => decoder.push(Op::Pred(PredOp::Mov, d, p, p)),
        };
        if let Some(result) = result {
            let whole = self.temp(Class::Pred);
            combined(self, p, whole);
            let d = self.d32(s)?;
            let (yes, no) = match result {
                Ty::F32 => (self.const32(1f32.to_bits()), self.const32(0)),
                Ty::U(32) | Ty::S(32) => (self.const32(u32::MAX), self.const32(0)),
                _ => return Err("set gives u32, s32 or f32 only".into()),
            };
            self.push(Op::Select32(d, yes, no, whole));
            return Ok(());
        }
        let (first, second) = self.pair(s, 0)?;
        // Where nothing is combined, the comparison itself writes the destination.
        if let (None, None, Operand::Reg(d)) = (&combine, &second, &first) {
            let d = self.reg(&Operand::Reg(*d), Class::Pred)?.index;
            match &mut self.code.last_mut().expect("the comparison was pushed").op {
                Op::Compare32(_, out, ..) | Op::Compare64(_, out, ..) => *out = d,
                _ => unreachable!("a comparison ends with its operation"),
            }
            return Ok(());
        }
        let inverse = self.temp(Class::Pred);
        self.push(Op::Pred(PredOp::Not, inverse, p, p));
        if first != Operand::Sink {
            let d = self.reg(&first, Class::Pred)?.index;
            // The second result is made first, because the first may overwrite the combining
            // predicate.
            let q = self.temp(Class::Pred);
            combined(self, inverse, q);
            combined(self, p, d);
            if let Some(second) = second.filter(|second| *second != Operand::Sink) {
                let second = self.reg(&second, Class::Pred)?.index;
                self.push(Op::Pred(PredOp::Mov, second, q, q));
            }
        } else if let Some(second) = second {
            let second = self.reg(&second, Class::Pred)?.index;
            combined(self, inverse, second);
        }
        Ok(())
    }

    pub(super) fn testp(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let name = m.first();
        if m.ty()? != Ty::F32 {
            return Err("testp is known for f32 only".into());
        }
        let (d, a) = (self.dst(s, 0, Class::Pred)?, self.a32(s, 1, Ty::F32)?);
        let magnitude = self.temp(Class::R32);
        self.push(Op::Unary32(Unary32::AbsF32, magnitude, a));
        let infinity = self.const32(0x7f80_0000);
        let op = match name {
            "finite" => Compare32::LtU,
            "infinite" => Compare32::Eq,
            "number" => Compare32::LeU,
            "notanumber" => Compare32::GtU,
            _ => return Err(format!("unknown modifier `.{name}`")),
        };
        self.push(Op::Compare32(op, d, magnitude, infinity));
        Ok(())
    }

    pub(super) fn select(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        if root == "slct" {
            m.take("ftz");
            let (ty, by) = (m.ty()?, m.ty()?);
            let op = match (ty.bits(), by) {
                (32, Ty::S(32)) => Ternary32::SlctS,
                (32, Ty::F32) => Ternary32::SlctF32,
                _ => return Err("this form of slct is unknown".into()),
            };
            let (d, a, b, c) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?, self.a32(s, 3, by)?);
            self.push(Op::Ternary32(op, d, a, b, c));
            return Ok(());
        }
        let ty = m.ty()?;
        let c = self.operand(s, 3)?.clone();
        let p = self.plain_predicate(&c)?;
        if ty.bits() == 64 {
            let (d, a, b) = (self.d64(s)?, self.a64(s, 1, ty)?, self.a64(s, 2, ty)?);
            self.push(Op::Select64(d, a, b, p));
        } else {
            let (d, a, b) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?);
            self.push(Op::Select32(d, a, b, p));
        }
        Ok(())
    }
}
