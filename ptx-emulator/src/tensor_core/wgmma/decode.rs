//! How a statement becomes an instruction of the family.

use super::{ElementType, Instruction, OperandA, Product};
use crate::decode::{Decode, Decoder, Mods, Ty};
use crate::isa::{Op, R};
use crate::parse::{Class, Operand, Statement};

impl Decoder<'_> {
    pub(crate) fn wgmma(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        self.has_wgmma = true;
        let name = m.first();
        if !m.take("sync") || !m.take("aligned") {
            return Err("wgmma needs `.sync.aligned`".into());
        }
        let instruction = match name {
            "fence" => Instruction::Fence,
            "commit_group" => Instruction::Commit,
            "wait_group" => Instruction::Wait(self.immediate(s, 0)? as u32),
            "mma_async" => Instruction::Multiply(Box::new(self.wgmma_product(s, m)?)),
            _ => return Err(format!("unknown instruction `wgmma.{name}`")),
        };
        self.push(Op::Wgmma(instruction));
        Ok(())
    }

    fn wgmma_product(&mut self, s: &Statement, m: &mut Mods) -> Decode<Product> {
        let shape = m.first();
        let types: Vec<&str> = std::mem::take(&mut m.parts);
        let element = match types[..] {
            ["f32", "bf16", "bf16"] => ElementType::Bf16,
            ["f32", "f16", "f16"] => ElementType::F16,
            ["f32", "e4m3", "e4m3"] => ElementType::E4m3,
            _ => {
                let known = "f32.bf16.bf16, f32.f16.f16 or f32.e4m3.e4m3";
                return Err(format!("types `{}` are unknown: {known}", types.join(".")));
            }
        };
        let n = shape.strip_prefix("m64n").and_then(|rest| rest.strip_suffix(&format!("k{}", element.k())));
        let n = n.and_then(|n| n.parse().ok());
        let Some(n) = n.filter(|n: &usize| (8..=256).contains(n) && n.is_multiple_of(8)) else {
            let known = format!("m64nNk{} with N a multiple of 8 up to 256", element.k());
            return Err(format!("shape `{shape}` is unknown: {known}"));
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
        // Matrices of 8 bits are always K-major, so their products have no operands for that.
        let expected = match (element, in_registers) {
            (ElementType::E4m3, _) => 6,
            (_, true) => 7,
            (_, false) => 8,
        };
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
        let (transpose_a, transpose_b) = match expected {
            6 => (false, false),
            7 => (false, flag(6)?),
            _ => (flag(6)?, flag(7)?),
        };
        Ok(Product { element, n, d, a, b, scale_d, negate_a, negate_b, transpose_a, transpose_b })
    }
}
