//! Conversions: `cvt`.

use super::{Decode, Decoder, Mods, Ty};
use crate::alu::*;
use crate::float::Round;
use crate::isa::*;
use crate::parse::{Class, Operand, Reg, Statement};

impl Decoder<'_> {
    /// `cvt.d.s`: extends the source to 32 or 64 bits, converts it, and cuts it to the destination.
    pub(super) fn convert(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let (ftz, saturate, satfinite, relu) = (m.take("ftz"), m.take("sat"), m.take("satfinite"), m.take("relu"));
        let integer_round = m.find(|part| {
            Some(match part {
                "rni" => Round::Nearest,
                "rzi" => Round::Zero,
                "rmi" => Round::Down,
                "rpi" => Round::Up,
                _ => return None,
            })
        });
        let away = m.take("rna");
        let round = m.rounding();
        if m.take("tf32") {
            let op = match (away, round) {
                (true, _) => Unary32::F32ToTf32,
                (_, Some(Round::Nearest)) => Unary32::F32ToTf32Rn,
                (_, Some(Round::Zero)) => Unary32::F32ToTf32Rz,
                _ => return Err("this rounding to tf32 is unknown".into()),
            };
            let from = m.ty()?;
            return self.un32(op, s, from);
        }
        let packed8 = m.find(|part| match part {
            "e4m3x2" => Some(true),
            "e5m2x2" => Some(false),
            _ => None,
        });
        if let Some(e4m3) = packed8 {
            // Only a conversion to 8 bits saturates, so this tells the two directions apart.
            let other = m.ty()?;
            return match other {
                Ty::F32 if satfinite && !relu => {
                    self.bin32(if e4m3 { Binary32::F32ToE4m3x2 } else { Binary32::F32ToE5m2x2 }, s, Ty::F32)
                }
                Ty::F16x2 if satfinite && !relu => {
                    self.un32(if e4m3 { Unary32::F16x2ToE4m3x2 } else { Unary32::F16x2ToE5m2x2 }, s, Ty::F16x2)
                }
                Ty::F16x2 if !relu => {
                    self.un32(if e4m3 { Unary32::E4m3x2ToF16x2 } else { Unary32::E5m2x2ToF16x2 }, s, Ty::B(16))
                }
                _ => Err("this fp8 conversion is unknown".into()),
            };
        }
        let (to, from) = (m.ty()?, m.ty()?);
        if matches!(to, Ty::F16x2 | Ty::Bf16x2) && from == Ty::F32 {
            return self.convert_pair(s, to, round, relu, satfinite);
        }
        if to.integer() && from.integer() {
            return self.convert_integers(s, to, from, saturate);
        }
        if from.integer() {
            return self.convert_from_integer(s, to, from, round.unwrap_or(Round::Nearest));
        }
        if to.integer() {
            let round = integer_round.or(round).unwrap_or(Round::Zero);
            return self.convert_to_integer(s, to, from, round, ftz);
        }
        // What follows is between floating-point types.
        if let Some(round) = integer_round {
            let (narrow, wide) = match round {
                Round::Nearest | Round::NearestAway => (Unary32::RoundF32, Unary64::RoundF64),
                Round::Zero => (Unary32::TruncF32, Unary64::TruncF64),
                Round::Down => (Unary32::FloorF32, Unary64::FloorF64),
                Round::Up => (Unary32::CeilF32, Unary64::CeilF64),
            };
            return match (to, from) {
                (Ty::F32, Ty::F32) => {
                    self.un32(narrow, s, from)?;
                    if ftz {
                        let d = self.d32(s)?;
                        self.push(Op::Unary32(Unary32::FlushF32, d, d));
                    }
                    self.saturate(s, saturate)
                }
                (Ty::F64, Ty::F64) => self.un64(wide, s, from),
                (Ty::F16, Ty::F16) | (Ty::Bf16, Ty::Bf16) => {
                    let (d, a) = (self.d32(s)?, self.a32(s, 1, from)?);
                    let value = self.temp(Class::R32);
                    let (up, down) = if from == Ty::F16 {
                        (Unary32::F16ToF32, Unary32::F32ToF16)
                    } else {
                        (Unary32::Bf16ToF32, Unary32::F32ToBf16)
                    };
                    self.push(Op::Unary32(up, value, a));
                    self.push(Op::Unary32(narrow, value, value));
                    self.push(Op::Unary32(down, d, value));
                    Ok(())
                }
                _ => Err("this conversion is unknown".into()),
            };
        }
        let round = round.unwrap_or(Round::Nearest);
        match (to, from) {
            (Ty::F32, Ty::F32) | (Ty::F32, Ty::F16 | Ty::Bf16) => {
                let op = match from {
                    Ty::F16 => Unary32::F16ToF32,
                    Ty::Bf16 => Unary32::Bf16ToF32,
                    _ if ftz => Unary32::FlushF32,
                    _ => Unary32::Mov,
                };
                self.un32(op, s, from)?;
                self.saturate(s, saturate)
            }
            (Ty::F64, Ty::F64) => self.un64(Unary64::Mov, s, from),
            (Ty::F64, Ty::F32 | Ty::F16 | Ty::Bf16) => {
                let (d, a) = (self.d64(s)?, self.a32(s, 1, from)?);
                let a = self.as_f32(a, from, ftz);
                self.push(Op::Widen(Widen::F32ToF64, d, a));
                Ok(())
            }
            (Ty::F32, Ty::F64) => {
                let (d, a) = (self.d32(s)?, self.a64(s, 1, from)?);
                let op = match round {
                    Round::Nearest | Round::NearestAway => Narrow::F64ToF32,
                    Round::Zero => Narrow::F64ToF32Rz,
                    Round::Down => Narrow::F64ToF32Rm,
                    Round::Up => Narrow::F64ToF32Rp,
                };
                self.push(Op::Narrow(op, d, a));
                if ftz {
                    self.push(Op::Unary32(Unary32::FlushF32, d, d));
                }
                self.saturate(s, saturate)
            }
            (Ty::F16 | Ty::Bf16, Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::F64) => {
                let d = self.d32(s)?;
                let bf16 = to == Ty::Bf16;
                if from == Ty::F64 {
                    let a = self.a64(s, 1, from)?;
                    self.push(Op::Narrow(half_rounding(bf16, round, satfinite), d, a));
                } else {
                    let a = self.a32(s, 1, from)?;
                    let a = self.as_f32(a, from, ftz);
                    self.narrow_half(d, a, bf16, round, satfinite);
                }
                if relu {
                    self.push(Op::Unary32(if bf16 { Unary32::ReluBf16 } else { Unary32::ReluF16 }, d, d));
                }
                if saturate {
                    return Err("`.sat` to a 16-bit float is unknown".into());
                }
                Ok(())
            }
            _ => Err("this conversion is unknown".into()),
        }
    }

    /// Converts f32 to f16, or to bf16 if `bf16` is set.
    fn narrow_half(&mut self, d: R, a: R, bf16: bool, round: Round, satfinite: bool) {
        if round == Round::Nearest && !satfinite {
            self.push(Op::Unary32(if bf16 { Unary32::F32ToBf16 } else { Unary32::F32ToF16 }, d, a));
        } else {
            let wide = self.temp(Class::R64);
            self.push(Op::Widen(Widen::F32ToF64, wide, a));
            self.push(Op::Narrow(half_rounding(bf16, round, satfinite), d, wide));
        }
    }

    fn convert_pair(&mut self, s: &Statement, to: Ty, round: Option<Round>, relu: bool, satfinite: bool) -> Decode {
        let bf16 = to == Ty::Bf16x2;
        let round = round.unwrap_or(Round::Nearest);
        if round == Round::Nearest && !relu && !satfinite {
            return self.bin32(if bf16 { Binary32::F32ToBf16x2 } else { Binary32::F32ToF16x2 }, s, Ty::F32);
        }
        let (d, a, b) = (self.d32(s)?, self.a32(s, 1, Ty::F32)?, self.a32(s, 2, Ty::F32)?);
        let halves = [self.temp(Class::R32), self.temp(Class::R32)];
        for (half, source) in halves.into_iter().zip([b, a]) {
            self.narrow_half(half, source, bf16, round, satfinite);
            if relu {
                self.push(Op::Unary32(if bf16 { Unary32::ReluBf16 } else { Unary32::ReluF16 }, half, half));
            }
        }
        self.push(Op::Binary32(Binary32::Pack16, d, halves[0], halves[1]));
        Ok(())
    }

    /// A register with the value of an f32, f16 or bf16 as f32.
    fn as_f32(&mut self, a: R, from: Ty, ftz: bool) -> R {
        let op = match from {
            Ty::F16 => Unary32::F16ToF32,
            Ty::Bf16 => Unary32::Bf16ToF32,
            _ if ftz => Unary32::FlushF32,
            _ => return a,
        };
        let out = self.temp(Class::R32);
        self.push(Op::Unary32(op, out, a));
        out
    }

    /// The source of a conversion from an integer, extended to 64 bits by the sign of its type.
    fn integer64(&mut self, s: &Statement, from: Ty) -> Decode<R> {
        let operand = self.operand(s, 1)?.clone();
        let out = self.temp(Class::R64);
        let signed = from.signed();
        if let Operand::Reg(Reg { class: Class::R64, index, .. }) = operand {
            let op = match (from.bits(), signed) {
                (8, true) => Unary64::Sext8,
                (8, false) => Unary64::Zext8,
                (16, true) => Unary64::Sext16,
                (16, false) => Unary64::Zext16,
                (32, true) => Unary64::Sext32,
                (32, false) => Unary64::Zext32,
                _ => return Ok(index),
            };
            self.push(Op::Unary64(op, out, index));
            return Ok(out);
        }
        if from.bits() == 64 {
            return self.read64(&operand, from);
        }
        let a = self.integer32(s, from)?;
        self.push(Op::Widen(if signed { Widen::Sext } else { Widen::Zext }, out, a));
        Ok(out)
    }

    /// The source of a conversion from an integer, extended or cut to 32 bits by the sign of its
    /// type.
    fn integer32(&mut self, s: &Statement, from: Ty) -> Decode<R> {
        let operand = self.operand(s, 1)?.clone();
        let a = match operand {
            Operand::Reg(Reg { class: Class::R64, index, .. }) => {
                let low = self.temp(Class::R32);
                self.push(Op::Narrow(Narrow::Low, low, index));
                low
            }
            ref operand => self.read32(operand, Ty::U(32))?,
        };
        let op = match (from.bits(), from.signed()) {
            (8, true) => Unary32::Sext8,
            (8, false) => Unary32::Zext8,
            (16, true) => Unary32::Sext16,
            (16, false) => Unary32::Zext16,
            _ => return Ok(a),
        };
        let out = self.temp(Class::R32);
        self.push(Op::Unary32(op, out, a));
        Ok(out)
    }

    /// Writes an integer to the destination of a conversion. As many low bits as its type has are
    /// right.
    fn put_integer(&mut self, s: &Statement, to: Ty, value: R) -> Decode {
        match self.operand(s, 0)?.clone() {
            Operand::Reg(Reg { class: Class::R64, index, .. }) => {
                // The destination is wider than its type, and is extended by the type's sign.
                self.push(Op::Widen(if to.signed() { Widen::Sext } else { Widen::Zext }, index, value));
            }
            operand => {
                let d = self.reg(&operand, Class::R32)?;
                let op = match (to.bits(), to.signed(), d.bits) {
                    (8, false, _) => Unary32::Zext8,
                    (8, true, 32) => Unary32::Sext8,
                    (8, true, _) => Unary32::Sext8To16,
                    (16, true, 32) => Unary32::Sext16,
                    (16, ..) => Unary32::Zext16,
                    _ => Unary32::Mov,
                };
                self.push(Op::Unary32(op, d.index, value));
            }
        }
        Ok(())
    }

    fn convert_integers(&mut self, s: &Statement, to: Ty, from: Ty, saturate: bool) -> Decode {
        if saturate {
            let mut value = self.integer64(s, from)?;
            let (low, high) = integer_range(to);
            // Signed arithmetic would take large u64 for negative, so an unsigned minimum cuts
            // those.
            if from == Ty::U(64) {
                let (top, out) = (self.const64(high as u64), self.temp(Class::R64));
                self.push(Op::Binary64(Binary64::MinU, out, value, top));
                value = out;
            } else {
                let (bottom, top) = (self.const64(low as u64), self.const64(high as u64));
                let out = self.temp(Class::R64);
                self.push(Op::Binary64(Binary64::MaxS, out, value, bottom));
                self.push(Op::Binary64(Binary64::MinS, out, out, top));
                value = out;
            }
            if to.bits() == 64 {
                let d = self.d64(s)?;
                self.push(Op::Unary64(Unary64::Mov, d, value));
                return Ok(());
            }
            let word = self.temp(Class::R32);
            self.push(Op::Narrow(Narrow::Low, word, value));
            return self.put_integer(s, to, word);
        }
        if to.bits() == 64 {
            let a = self.integer64(s, from)?;
            let d = self.d64(s)?;
            self.push(Op::Unary64(Unary64::Mov, d, a));
            return Ok(());
        }
        // The sign of the source matters only where the destination is wider: the low bits are the
        // same.
        let a = if from.bits() == 64 {
            let wide = self.integer64(s, from)?;
            let low = self.temp(Class::R32);
            self.push(Op::Narrow(Narrow::Low, low, wide));
            low
        } else {
            self.integer32(s, from)?
        };
        self.put_integer(s, to, a)
    }

    fn convert_from_integer(&mut self, s: &Statement, to: Ty, from: Ty, round: Round) -> Decode {
        let nearest = round == Round::Nearest;
        match to {
            Ty::F32 if from.bits() <= 32 => {
                let (d, a) = (self.d32(s)?, self.integer32(s, from)?);
                if nearest {
                    let op = if from.signed() { Unary32::S32ToF32 } else { Unary32::U32ToF32 };
                    self.push(Op::Unary32(op, d, a));
                } else {
                    let kind = if from.signed() { Directed::FromS32 } else { Directed::FromU32 };
                    self.push(Op::Directed(kind, round, d, [a; 3]));
                }
            }
            Ty::F32 if nearest => {
                let (d, a) = (self.d32(s)?, self.integer64(s, from)?);
                self.push(Op::Narrow(if from.signed() { Narrow::S64ToF32 } else { Narrow::U64ToF32 }, d, a));
            }
            Ty::F64 if nearest || from.bits() <= 32 => {
                let (d, a) = (self.d64(s)?, self.integer64(s, from)?);
                self.push(Op::Unary64(if from.signed() { Unary64::S64ToF64 } else { Unary64::U64ToF64 }, d, a));
            }
            Ty::F16 | Ty::Bf16 if from.bits() <= 32 => {
                let (d, a) = (self.d32(s)?, self.integer64(s, from)?);
                let wide = self.temp(Class::R64);
                self.push(Op::Unary64(if from.signed() { Unary64::S64ToF64 } else { Unary64::U64ToF64 }, wide, a));
                self.push(Op::Narrow(half_rounding(to == Ty::Bf16, round, false), d, wide));
            }
            _ => return Err("this conversion is unknown".into()),
        }
        Ok(())
    }

    /// Rounds the source to an integer, and saturates that to the range of the destination.
    fn convert_to_integer(&mut self, s: &Statement, to: Ty, from: Ty, round: Round, ftz: bool) -> Decode {
        let signed = to.signed();
        if from == Ty::F64 {
            let a = self.a64(s, 1, from)?;
            let rounded = self.temp(Class::R64);
            let op = match round {
                Round::Nearest | Round::NearestAway => Unary64::RoundF64,
                Round::Zero => Unary64::TruncF64,
                Round::Down => Unary64::FloorF64,
                Round::Up => Unary64::CeilF64,
            };
            self.push(Op::Unary64(op, rounded, a));
            if to.bits() == 64 {
                let d = self.d64(s)?;
                self.push(Op::Unary64(if signed { Unary64::F64ToS64 } else { Unary64::F64ToU64 }, d, rounded));
                return Ok(());
            }
            let value = self.temp(Class::R32);
            self.push(Op::Narrow(if signed { Narrow::F64ToS32 } else { Narrow::F64ToU32 }, value, rounded));
            return self.clamp_integer(s, to, value);
        }
        let a = self.a32(s, 1, from)?;
        let a = self.as_f32(a, from, ftz);
        let rounded = self.temp(Class::R32);
        let op = match round {
            Round::Nearest | Round::NearestAway => Unary32::RoundF32,
            Round::Zero => Unary32::TruncF32,
            Round::Down => Unary32::FloorF32,
            Round::Up => Unary32::CeilF32,
        };
        self.push(Op::Unary32(op, rounded, a));
        if to.bits() == 64 {
            let d = self.d64(s)?;
            self.push(Op::Widen(if signed { Widen::F32ToS64 } else { Widen::F32ToU64 }, d, rounded));
            return Ok(());
        }
        let value = self.temp(Class::R32);
        self.push(Op::Unary32(if signed { Unary32::F32ToS32 } else { Unary32::F32ToU32 }, value, rounded));
        self.clamp_integer(s, to, value)
    }

    fn clamp_integer(&mut self, s: &Statement, to: Ty, value: R) -> Decode {
        if to.bits() < 32 {
            let (low, high) = integer_range(to);
            let (low, high) = (self.const32(low as u32), self.const32(high as u32));
            if to.signed() {
                self.push(Op::Binary32(Binary32::MaxS, value, value, low));
                self.push(Op::Binary32(Binary32::MinS, value, value, high));
            } else {
                self.push(Op::Binary32(Binary32::MinU, value, value, high));
            }
        }
        self.put_integer(s, to, value)
    }
}

fn half_rounding(bf16: bool, round: Round, satfinite: bool) -> Narrow {
    match (bf16, round, satfinite) {
        (false, _, true) => Narrow::F64ToF16Sat,
        (true, _, true) => Narrow::F64ToBf16Sat,
        (false, Round::Nearest | Round::NearestAway, _) => Narrow::F64ToF16,
        (false, Round::Zero, _) => Narrow::F64ToF16Rz,
        (false, Round::Down, _) => Narrow::F64ToF16Rm,
        (false, Round::Up, _) => Narrow::F64ToF16Rp,
        (true, Round::Nearest | Round::NearestAway, _) => Narrow::F64ToBf16,
        (true, Round::Zero, _) => Narrow::F64ToBf16Rz,
        (true, Round::Down, _) => Narrow::F64ToBf16Rm,
        (true, Round::Up, _) => Narrow::F64ToBf16Rp,
    }
}

/// The least and the greatest value of an integer type; of u64, the greatest value of i64.
fn integer_range(ty: Ty) -> (i64, i64) {
    let bits = ty.bits();
    if ty.signed() {
        (i64::MIN >> (64 - bits), i64::MAX >> (64 - bits))
    } else {
        (0, if bits >= 63 { i64::MAX } else { (1 << bits) - 1 })
    }
}
