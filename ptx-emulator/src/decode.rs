//! Statements to operations: what each opcode and modifier means. Anything unknown is an error that names it.

use crate::alu::*;
use crate::fault::{Error, shorten};
use crate::float::Round;
use crate::isa::*;
use crate::parse::{Class, Entry, Operand, Reg, Statement, VariableSpace};
use std::collections::HashMap;

/// A symbol's place in the address space of its kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Symbol {
    pub address: u64,
}

/// Fundamental types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ty {
    Pred,
    B(u32),
    U(u32),
    S(u32),
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

impl Ty {
    fn parse(name: &str) -> Option<Ty> {
        Some(match name {
            "pred" => Ty::Pred,
            "b8" => Ty::B(8),
            "b16" => Ty::B(16),
            "b32" => Ty::B(32),
            "b64" => Ty::B(64),
            "u8" => Ty::U(8),
            "u16" => Ty::U(16),
            "u32" => Ty::U(32),
            "u64" => Ty::U(64),
            "s8" => Ty::S(8),
            "s16" => Ty::S(16),
            "s32" => Ty::S(32),
            "s64" => Ty::S(64),
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::Bf16,
            "bf16x2" => Ty::Bf16x2,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    fn bits(self) -> u32 {
        match self {
            Ty::Pred => 1,
            Ty::B(bits) | Ty::U(bits) | Ty::S(bits) => bits,
            Ty::F16 | Ty::Bf16 => 16,
            Ty::F32 | Ty::F16x2 | Ty::Bf16x2 => 32,
            Ty::F64 => 64,
        }
    }

    fn signed(self) -> bool {
        matches!(self, Ty::S(_))
    }

    fn integer(self) -> bool {
        matches!(self, Ty::B(_) | Ty::U(_) | Ty::S(_))
    }
}

/// What a decoder step returns: a message without its place, which [`Decoder::statement`] adds.
type Decode<T = ()> = Result<T, String>;

/// The parts of an opcode behind its root, taken one by one; what is left over is unknown.
struct Mods<'a> {
    parts: Vec<&'a str>,
}

impl<'a> Mods<'a> {
    /// Takes a modifier wherever it stands.
    fn take(&mut self, name: &str) -> bool {
        match self.parts.iter().position(|part| *part == name) {
            Some(at) => {
                self.parts.remove(at);
                true
            }
            None => false,
        }
    }

    /// Takes the first modifier for which `find` knows a meaning.
    fn find<T>(&mut self, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (at, found) = self.parts.iter().enumerate().find_map(|(at, part)| find(part).map(|found| (at, found)))?;
        self.parts.remove(at);
        Some(found)
    }

    fn ty(&mut self) -> Decode<Ty> {
        self.find(Ty::parse).ok_or_else(|| "the instruction has no type".to_string())
    }

    fn rounding(&mut self) -> Option<Round> {
        self.find(|part| match part {
            "rn" => Some(Round::Nearest),
            "rz" => Some(Round::Zero),
            "rm" => Some(Round::Down),
            "rp" => Some(Round::Up),
            _ => None,
        })
    }

    /// Memory-model words, which change nothing where every access is in order; cache hints likewise.
    fn memory_words(&mut self) {
        const KNOWN: [&str; 27] = [
            "relaxed",
            "acquire",
            "release",
            "acq_rel",
            "weak",
            "volatile",
            "mmio",
            "cta",
            "cluster",
            "gpu",
            "sys",
            "nc",
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "wb",
            "wt",
            "sc",
            "noftz",
            "unified",
            "L1::evict_first",
            "L1::evict_last",
            "L1::no_allocate",
            "L1::evict_normal",
            "L1::evict_unchanged",
        ];
        self.parts.retain(|part| {
            let l2 = part.starts_with("L2::") && *part != "L2::cache_hint";
            !(KNOWN.contains(part) || l2)
        });
    }

    fn space(&mut self) -> Decode<Space> {
        let found = self.find(|part| {
            Some(match part {
                "global" | "const" => Space::Global,
                "shared" | "shared::cta" | "shared::cluster" => Space::Shared,
                "local" => Space::Local,
                "param" | "param::entry" => Space::Param,
                _ => return None,
            })
        });
        Ok(found.unwrap_or(Space::Generic))
    }

    fn done(self) -> Decode {
        match self.parts.first() {
            None => Ok(()),
            Some(part) => Err(format!("unknown modifier `.{part}`")),
        }
    }
}

pub(crate) struct Decoder<'a> {
    module: &'a str,
    entry: &'a Entry,
    symbols: HashMap<&'a str, Symbol>,
    code: Vec<Inst>,
    registers: [u32; 3],
    constants32: HashMap<u32, R>,
    constants64: HashMap<u64, R>,
    specials: HashMap<Special, R>,
    true_predicate: R,
    /// Predicates written so far by the current statement, to keep its guard alive.
    carry: Option<R>,
    has_wgmma: bool,
}

/// Decodes one entry. `symbols` are those of the module: global data by address, static shared memory by its address.
pub(crate) fn decode(
    module: &str,
    entry: &Entry,
    symbols: &HashMap<String, Symbol>,
    shared_used: u32,
) -> Result<Kernel, Error> {
    let mut symbols: HashMap<&str, Symbol> = symbols.iter().map(|(name, symbol)| (name.as_str(), *symbol)).collect();
    for (param, offset) in &entry.params {
        symbols.insert(&param.name, Symbol { address: *offset });
    }
    let (mut shared, mut local, mut dynamic_align) = (shared_used, 0u64, 16);
    let mut dynamic = Vec::new();
    for variable in &entry.variables {
        let align = variable.align.max(1);
        let address = match (variable.space, variable.bytes) {
            (VariableSpace::Shared, Some(bytes)) => {
                let address = (shared as u64).next_multiple_of(align);
                shared = (address + bytes) as u32;
                address
            }
            (VariableSpace::Local, Some(bytes)) => {
                let address = local.next_multiple_of(align);
                local = address + bytes;
                address
            }
            (_, None) => {
                dynamic_align = dynamic_align.max(align as u32);
                dynamic.push(variable.name.as_str());
                0
            }
            _ => return Err(Error::at(module, 0, format!("variable `{}` cannot stand in a body", variable.name))),
        };
        symbols.insert(&variable.name, Symbol { address });
    }
    for name in dynamic {
        symbols.insert(name, Symbol { address: (shared as u64).next_multiple_of(dynamic_align as u64) });
    }
    let mut decoder = Decoder {
        module,
        entry,
        symbols,
        code: Vec::new(),
        registers: entry.registers,
        constants32: HashMap::new(),
        constants64: HashMap::new(),
        specials: HashMap::new(),
        true_predicate: 0,
        carry: None,
        has_wgmma: false,
    };
    decoder.true_predicate = decoder.temp(Class::Pred);
    let mut starts = Vec::with_capacity(entry.statements.len() + 1);
    for (index, statement) in entry.statements.iter().enumerate() {
        starts.push(decoder.code.len() as u32);
        decoder.statement(index as u32, statement)?;
    }
    // Falling off the end of a body returns.
    starts.push(decoder.code.len() as u32);
    let last = entry.statements.len().saturating_sub(1) as u32;
    decoder.code.push(Inst { op: Op::Exit, guard: NO_GUARD, statement: last, first: false, fragment: NO_FRAGMENT });
    for inst in &mut decoder.code {
        match &mut inst.op {
            Op::Branch(target) => *target = starts[*target as usize],
            Op::BranchIndexed(_, targets) => targets.iter_mut().for_each(|target| *target = starts[*target as usize]),
            _ => {}
        }
    }
    let mut fragment_uses = Vec::new();
    if decoder.has_wgmma {
        let constants: Vec<R> = decoder.constants32.values().chain(decoder.specials.values()).copied().collect();
        fragment_uses = mark_fragments(&mut decoder.code, decoder.registers[Class::R32 as usize] as usize, &constants);
    }
    let lines = entry
        .statements
        .iter()
        .map(|s| Line { line: s.line, text: s.text.clone(), opcode: s.opcode.clone() })
        .chain(entry.statements.is_empty().then(|| Line { line: 0, text: "ret".into(), opcode: "ret".into() }))
        .collect();
    let mut constants32: Vec<(R, u32)> = decoder.constants32.iter().map(|(value, r)| (*r, *value)).collect();
    let mut constants64: Vec<(R, u64)> = decoder.constants64.iter().map(|(value, r)| (*r, *value)).collect();
    constants32.sort_unstable();
    constants64.sort_unstable();
    Ok(Kernel {
        name: entry.name.clone(),
        registers: decoder.registers.map(|count| count as usize),
        constants32,
        constants64,
        true_predicate: decoder.true_predicate,
        specials: decoder.specials.iter().map(|(special, r)| (*r, *special)).collect(),
        code: decoder.code,
        lines,
        param_bytes: entry.param_bytes,
        static_shared: shared - SHARED_BASE,
        dynamic_align,
        local_bytes: local as u32,
        max_threads: entry.max_threads,
        required_block: entry.required_block,
        min_blocks: entry.min_blocks,
        has_wgmma: decoder.has_wgmma,
        fragment_uses,
    })
}

/// Marks the operations that touch registers of a `wgmma`, or registers that a `mov` joins with them: ptxas makes one of the two.
/// Constants do not join what they are moved to.
fn mark_fragments(code: &mut [Inst], registers: usize, constants: &[R]) -> Vec<FragmentUse> {
    let mut constant = vec![false; registers];
    constants.iter().for_each(|r| constant[*r as usize] = true);
    let mut fragment = vec![false; registers];
    for inst in code.iter() {
        if let Op::Wgmma(wgmma) = &inst.op {
            wgmma.d.iter().for_each(|r| fragment[*r as usize] = true);
            if let OperandA::Registers(a) = wgmma.a {
                a.into_iter().for_each(|r| fragment[r as usize] = true);
            }
        }
    }
    loop {
        let mut grown = false;
        for inst in code.iter() {
            if let Op::Unary32(Unary32::Mov, d, a) = inst.op
                && fragment[a as usize] != fragment[d as usize]
                && !constant[a as usize]
            {
                (fragment[a as usize], fragment[d as usize]) = (true, true);
                grown = true;
            }
        }
        if !grown {
            break;
        }
    }
    let mut uses = Vec::new();
    for inst in code {
        let mut found =
            FragmentUse { copy: matches!(inst.op, Op::Unary32(Unary32::Mov, ..)), ..FragmentUse::default() };
        inst.op.visit32(&mut |r, how| match how {
            // A copy needs its source even if that is a constant.
            Use::Read if fragment[r as usize] || found.copy => found.reads.push(r),
            Use::Write if fragment[r as usize] => found.writes.push(r),
            _ => {}
        });
        if (found.copy && found.writes.is_empty()) || (found.reads.is_empty() && found.writes.is_empty()) {
            continue;
        }
        inst.fragment = uses.len() as u32;
        uses.push(found);
    }
    uses
}

impl<'a> Decoder<'a> {
    fn temp(&mut self, class: Class) -> R {
        let file = &mut self.registers[class as usize];
        *file += 1;
        *file - 1
    }

    fn const32(&mut self, value: u32) -> R {
        if let Some(r) = self.constants32.get(&value) {
            return *r;
        }
        let r = self.temp(Class::R32);
        self.constants32.insert(value, r);
        r
    }

    fn const64(&mut self, value: u64) -> R {
        if let Some(r) = self.constants64.get(&value) {
            return *r;
        }
        let r = self.temp(Class::R64);
        self.constants64.insert(value, r);
        r
    }

    fn special(&mut self, special: Special) -> R {
        if let Some(r) = self.specials.get(&special) {
            return *r;
        }
        let r = self.temp(Class::R32);
        self.specials.insert(special, r);
        r
    }

    fn push(&mut self, op: Op) {
        self.code.push(Inst { op, guard: NO_GUARD, statement: 0, first: false, fragment: NO_FRAGMENT });
    }

    fn statement(&mut self, index: u32, statement: &Statement) -> Result<(), Error> {
        let first = self.code.len();
        let fail =
            |what: String| Error::at(self.module, statement.line, format!("{what}, in `{}`", shorten(&statement.text)));
        self.instruction(statement).map_err(fail)?;
        if self.code.len() == first {
            self.push(Op::Nop);
        }
        let mut guard = statement.guard.map_or(NO_GUARD, |(p, negated)| p << 1 | negated as u32);
        if guard != NO_GUARD && self.code.len() > first + 1 {
            // The guard is read once, before any of the operations may overwrite it.
            let copy = self.temp(Class::Pred);
            let op = Op::Pred(PredOp::Mov, copy, guard >> 1, guard >> 1);
            self.code.insert(first, Inst { op, guard: NO_GUARD, statement: 0, first: false, fragment: NO_FRAGMENT });
            guard = copy << 1 | guard & 1;
        }
        let unguarded = self.code.len() > first + 1 && guard != NO_GUARD;
        for (at, inst) in self.code[first..].iter_mut().enumerate() {
            inst.statement = index;
            inst.first = at == 0;
            inst.guard = if at == 0 && unguarded { NO_GUARD } else { guard };
        }
        Ok(())
    }

    // Operands.

    fn operand<'s>(&self, s: &'s Statement, i: usize) -> Decode<&'s Operand> {
        s.operands.get(i).ok_or_else(|| format!("operand {} is missing", i + 1))
    }

    fn reg(&self, operand: &Operand, class: Class) -> Decode<Reg> {
        match operand {
            Operand::Reg(reg) if reg.class == class => Ok(*reg),
            Operand::Reg(reg) => Err(format!("a register of {} bits stands where {class:?} is needed", reg.bits)),
            other => Err(format!("{other:?} stands where a register is needed")),
        }
    }

    /// Destination register; a sink gives a scratch register.
    fn dst(&mut self, s: &Statement, i: usize, class: Class) -> Decode<R> {
        match self.operand(s, i)? {
            Operand::Sink => Ok(self.temp(class)),
            operand => Ok(self.reg(operand, class)?.index),
        }
    }

    fn d32(&mut self, s: &Statement) -> Decode<R> {
        self.dst(s, 0, Class::R32)
    }

    fn d64(&mut self, s: &Statement) -> Decode<R> {
        self.dst(s, 0, Class::R64)
    }

    fn symbol(&mut self, name: &str, offset: i64) -> Decode<u64> {
        match self.symbols.get(name) {
            Some(symbol) => Ok(symbol.address.wrapping_add(offset as u64)),
            None => Err(format!("`{name}` is not declared")),
        }
    }

    /// A source of up to 32 bits, as a register.
    fn read32(&mut self, operand: &Operand, ty: Ty) -> Decode<R> {
        Ok(match operand {
            Operand::Reg(_) => self.reg(operand, Class::R32)?.index,
            Operand::Int(value) if ty.bits() == 16 => self.const32(*value as u32 & 0xffff),
            Operand::Int(value) => self.const32(*value as u32),
            Operand::F32(bits) => self.const32(*bits),
            Operand::F64(bits) => self.const32((f64::from_bits(*bits) as f32).to_bits()),
            Operand::Name(name, offset) => match special(name) {
                Some(found) => self.special(found),
                None => {
                    let address = self.symbol(name, *offset)?;
                    self.const32(address as u32)
                }
            },
            other => return Err(format!("{other:?} stands where a 32-bit value is needed")),
        })
    }

    fn read64(&mut self, operand: &Operand, ty: Ty) -> Decode<R> {
        Ok(match operand {
            Operand::Reg(_) => self.reg(operand, Class::R64)?.index,
            Operand::Int(value) => self.const64(*value as u64),
            Operand::F64(bits) => self.const64(*bits),
            Operand::F32(bits) if ty == Ty::F64 => self.const64((f32::from_bits(*bits) as f64).to_bits()),
            Operand::Name(name, offset) => {
                let address = self.symbol(name, *offset)?;
                self.const64(address)
            }
            other => return Err(format!("{other:?} stands where a 64-bit value is needed")),
        })
    }

    fn a32(&mut self, s: &Statement, i: usize, ty: Ty) -> Decode<R> {
        let operand = self.operand(s, i)?.clone();
        self.read32(&operand, ty)
    }

    fn a64(&mut self, s: &Statement, i: usize, ty: Ty) -> Decode<R> {
        let operand = self.operand(s, i)?.clone();
        self.read64(&operand, ty)
    }

    fn u32_at(&mut self, s: &Statement, i: usize) -> Decode<R> {
        self.a32(s, i, Ty::U(32))
    }

    /// Predicate source and whether it is negated; immediates are allowed.
    fn predicate(&mut self, operand: &Operand) -> Decode<(R, bool)> {
        match operand {
            Operand::Reg(_) => Ok((self.reg(operand, Class::Pred)?.index, false)),
            Operand::Not(inner) => {
                let (p, negated) = self.predicate(inner)?;
                Ok((p, !negated))
            }
            Operand::Int(value) => Ok((self.true_predicate, *value == 0)),
            other => Err(format!("{other:?} stands where a predicate is needed")),
        }
    }

    /// Predicate source as a register that holds its value.
    fn plain_predicate(&mut self, operand: &Operand) -> Decode<R> {
        let (p, negated) = self.predicate(operand)?;
        if !negated {
            return Ok(p);
        }
        let inverse = self.temp(Class::Pred);
        self.push(Op::Pred(PredOp::Not, inverse, p, p));
        Ok(inverse)
    }

    fn immediate(&self, s: &Statement, i: usize) -> Decode<i64> {
        match self.operand(s, i)? {
            Operand::Int(value) => Ok(*value),
            other => Err(format!("operand {} must be an immediate, found {other:?}", i + 1)),
        }
    }

    fn address(&mut self, s: &Statement, i: usize, space: Space) -> Decode<Address> {
        let operand = self.operand(s, i)?.clone();
        self.address_of(&operand, space)
    }

    fn address_of(&mut self, operand: &Operand, space: Space) -> Decode<Address> {
        let Operand::Address(base, offset) = operand else {
            return Err(format!("{operand:?} stands where an address in brackets is needed"));
        };
        Ok(match &**base {
            Operand::Reg(Reg { class: Class::R64, index, .. }) => Address { base: Base::R64(*index), offset: *offset },
            Operand::Reg(Reg { class: Class::R32, index, .. })
                if matches!(space, Space::Shared | Space::Local | Space::Param) =>
            {
                Address { base: Base::R32(*index), offset: *offset }
            }
            Operand::Name(name, inner) => {
                let address = self.symbol(name, *inner)? as i64;
                Address { base: Base::None, offset: address + offset }
            }
            Operand::Int(value) => Address { base: Base::None, offset: value + offset },
            other => return Err(format!("{other:?} cannot be the base of an address in {} memory", space.name())),
        })
    }

    /// Elements of a vector operand, or the operand itself.
    fn elements(operand: &Operand) -> Vec<Operand> {
        match operand {
            Operand::Vector(elements) => elements.clone(),
            other => vec![other.clone()],
        }
    }

    fn slot(&mut self, operand: &Operand, ty: Ty, store: bool) -> Decode<Slot> {
        Ok(match operand {
            Operand::Reg(Reg { class: Class::R32, index, bits }) => Slot::R32(*index, *bits),
            Operand::Reg(Reg { class: Class::R64, index, .. }) => Slot::R64(*index),
            Operand::Sink if !store => Slot::Sink,
            other if store && ty.bits() == 64 => Slot::R64(self.read64(other, ty)?),
            other if store => Slot::R32(self.read32(other, ty)?, 32),
            other => return Err(format!("{other:?} cannot be loaded to")),
        })
    }

    // Instructions.

    fn instruction(&mut self, s: &Statement) -> Decode {
        let mut parts = s.opcode.split('.');
        let root = parts.next().unwrap_or_default();
        let mut m = Mods { parts: parts.collect() };
        match root {
            "mov" => self.mov(s, &mut m)?,
            "add" | "sub" | "mul" | "div" | "rem" | "min" | "max" | "and" | "or" | "xor" | "shl" | "shr" | "mul24"
            | "copysign" => self.binary(root, s, &mut m)?,
            "addc" | "subc" => self.carry(s, root == "subc", true, &mut m)?,
            "mad" | "fma" | "mad24" | "sad" | "dp4a" => self.ternary(root, s, &mut m)?,
            "abs" | "neg" | "not" | "cnot" | "brev" | "popc" | "clz" | "rcp" | "ex2" | "lg2" | "sqrt" | "rsqrt"
            | "sin" | "cos" | "tanh" => self.unary(root, s, &mut m)?,
            "bfind" | "bfe" | "bfi" | "shf" | "prmt" | "lop3" | "bmsk" => self.bits(root, s, &mut m)?,
            "setp" | "set" => self.compare(root, s, &mut m)?,
            "testp" => self.testp(s, &mut m)?,
            "selp" | "slct" => self.select(root, s, &mut m)?,
            "cvt" => self.convert(s, &mut m)?,
            "cvta" => self.cvta(s, &mut m)?,
            "isspacep" => {
                let (p, a) = (self.dst(s, 0, Class::Pred)?, self.a64(s, 1, Ty::U(64))?);
                let space = m.space()?;
                self.push(Op::IsSpace(p, a, space));
            }
            // A cluster of one block: an address maps to itself.
            "mapa" => {
                m.space()?;
                match m.ty()?.bits() {
                    64 => {
                        let (d, a) = (self.d64(s)?, self.a64(s, 1, Ty::U(64))?);
                        self.push(Op::Unary64(Unary64::Mov, d, a));
                    }
                    _ => {
                        let (d, a) = (self.d32(s)?, self.u32_at(s, 1)?);
                        self.push(Op::Unary32(Unary32::Mov, d, a));
                    }
                }
            }
            "ld" | "ldu" | "st" => self.load_store(root == "st", s, &mut m)?,
            "atom" | "red" => self.atomic(root == "atom", s, &mut m)?,
            "bra" => {
                m.take("uni");
                let target = self.target(s, 0)?;
                self.push(Op::Branch(target));
            }
            "brx" => {
                m.take("idx");
                m.take("uni");
                let index = self.u32_at(s, 0)?;
                let Operand::Name(list, _) = self.operand(s, 1)? else {
                    return Err("the list of branch targets is missing".into());
                };
                let entry = self.entry;
                let names = entry.targets(s, list).ok_or_else(|| format!("`{list}` is not a list of targets"))?;
                let targets = names
                    .iter()
                    .map(|name| entry.label(s, name).map(|at| at as u32).ok_or_else(|| format!("no label `{name}`")))
                    .collect::<Decode<Vec<u32>>>()?;
                self.push(Op::BranchIndexed(index, targets.into()));
            }
            "ret" | "exit" => {
                m.take("uni");
                self.push(Op::Exit);
            }
            "trap" => self.push(Op::Trap),
            "nanosleep" => {
                m.ty()?;
                self.push(Op::Yield);
            }
            "membar" => {
                m.find(|part| matches!(part, "cta" | "gl" | "sys").then_some(()));
                self.push(Op::Nop);
            }
            "fence" => self.fence(&mut m)?,
            "griddepcontrol" => {
                m.find(|part| matches!(part, "wait" | "launch_dependents").then_some(()));
            }
            "prefetch" | "prefetchu" | "discard" | "applypriority" => {
                let space = m.space()?;
                m.parts.retain(|part| !matches!(*part, "L1" | "L2") && !part.starts_with("L2::"));
                let address = self.address(s, 0, space)?;
                self.push(Op::Prefetch(address));
            }
            "createpolicy" => {
                m.parts.retain(|part| !part.starts_with("L2::") && *part != "fractional" && *part != "b64");
                let (d, policy) = (self.d64(s)?, self.const64(0));
                self.push(Op::Unary64(Unary64::Mov, d, policy));
            }
            "shfl" => self.shuffle(s, &mut m)?,
            "vote" => self.vote(s, &mut m)?,
            "activemask" => {
                m.take("b32");
                let d = self.d32(s)?;
                self.push(Op::ActiveMask(d));
            }
            "match" => self.match_sync(s, &mut m)?,
            "redux" => self.redux(s, &mut m)?,
            "elect" => {
                if !m.take("sync") {
                    return Err("`elect` without `.sync` is unknown".into());
                }
                let (d, p) = self.pair(s, 0)?;
                let d = match d {
                    Operand::Sink => None,
                    d => Some(self.reg(&d, Class::R32)?.index),
                };
                let p = self.reg(&p.ok_or("the predicate is missing")?, Class::Pred)?.index;
                let mask = self.u32_at(s, 1)?;
                self.push(Op::Elect { d, p, mask });
            }
            "bar" | "barrier" => self.barrier(root == "bar", s, &mut m)?,
            "mbarrier" => self.mbarrier(s, &mut m)?,
            "cp" => self.bulk(s, &mut m)?,
            "wgmma" => self.wgmma(s, &mut m)?,
            "ldmatrix" | "stmatrix" => self.matrix(root == "stmatrix", s, &mut m)?,
            "setmaxnreg" => {
                let increase = match m.find(|part| match part {
                    "inc" => Some(true),
                    "dec" => Some(false),
                    _ => None,
                }) {
                    Some(increase) if m.take("sync") && m.take("aligned") && m.take("u32") => increase,
                    _ => return Err("only `setmaxnreg.{inc,dec}.sync.aligned.u32` is known".into()),
                };
                let count = self.immediate(s, 0)?;
                if !(24..=256).contains(&count) || count % 8 != 0 {
                    return Err(format!("{count} registers: setmaxnreg takes a multiple of 8 from 24 to 256"));
                }
                self.push(Op::SetMaxRegisters(count as u32, increase));
            }
            _ => return Err(format!("unknown instruction `{root}`")),
        }
        m.done()
    }

    /// `a|b` or a single operand.
    fn pair(&self, s: &Statement, i: usize) -> Decode<(Operand, Option<Operand>)> {
        Ok(match self.operand(s, i)? {
            Operand::Pair(a, b) => ((**a).clone(), Some((**b).clone())),
            single => (single.clone(), None),
        })
    }

    fn target(&self, s: &Statement, i: usize) -> Decode<u32> {
        match self.operand(s, i)? {
            Operand::Name(name, 0) => {
                self.entry.label(s, name).map(|at| at as u32).ok_or_else(|| format!("no label `{name}` in reach"))
            }
            other => Err(format!("{other:?} stands where a label is needed")),
        }
    }

    fn mov(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    /// `mov.b64 d, {a, b}`: elements from the lowest.
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

    /// `mov.b64 {a, b}, c`. Written to scratch first: an element may be the source.
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
        // The source word of a 32-bit unpack is read by two operations; 16-bit destinations cannot be it.
        moves.into_iter().for_each(|op| self.push(op));
        Ok(())
    }

    fn un32(&mut self, op: Unary32, s: &Statement, ty: Ty) -> Decode {
        let (d, a) = (self.d32(s)?, self.a32(s, 1, ty)?);
        self.push(Op::Unary32(op, d, a));
        Ok(())
    }

    fn un64(&mut self, op: Unary64, s: &Statement, ty: Ty) -> Decode {
        let (d, a) = (self.d64(s)?, self.a64(s, 1, ty)?);
        self.push(Op::Unary64(op, d, a));
        Ok(())
    }

    fn bin32(&mut self, op: Binary32, s: &Statement, ty: Ty) -> Decode {
        let (d, a, b) = (self.d32(s)?, self.a32(s, 1, ty)?, self.a32(s, 2, ty)?);
        self.push(Op::Binary32(op, d, a, b));
        Ok(())
    }

    fn bin64(&mut self, op: Binary64, s: &Statement, ty: Ty) -> Decode {
        let (d, a, b) = (self.d64(s)?, self.a64(s, 1, ty)?, self.a64(s, 2, ty)?);
        self.push(Op::Binary64(op, d, a, b));
        Ok(())
    }

    fn flushed(&mut self, r: R) -> R {
        let out = self.temp(Class::R32);
        self.push(Op::Unary32(Unary32::FlushF32, out, r));
        out
    }

    /// f32 arithmetic whose rounding is not to nearest, with flushing of operands and result if asked for.
    fn directed(&mut self, kind: Directed, round: Round, ftz: bool, s: &Statement, sources: usize) -> Decode {
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

    fn binary(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
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

    fn no_modifiers(&self, ftz: bool, saturate: bool, nan: bool) -> Decode {
        if ftz || saturate || nan {
            return Err("`.ftz`, `.sat` or `.NaN` is unknown for this type".into());
        }
        Ok(())
    }

    /// `.sat` of f32: the result clamped to [0, 1].
    fn saturate(&mut self, s: &Statement, saturate: bool) -> Decode {
        if saturate {
            let d = self.d32(s)?;
            self.push(Op::Unary32(Unary32::SatF32, d, d));
        }
        Ok(())
    }

    fn carry(&mut self, s: &Statement, subtract: bool, read: bool, m: &mut Mods) -> Decode {
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

    fn ternary(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        use Ternary32 as T;
        let round = m.rounding();
        let (ftz, saturate, relu) = (m.take("ftz"), m.take("sat"), m.take("relu"));
        let (wide, hi, _low) = (m.take("wide"), m.take("hi"), m.take("lo"));
        let ty = m.ty()?;
        if root == "dp4a" {
            // Both types are the same in everything that is emitted.
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

    fn unary(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
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

    fn bits(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
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

    /// The comparison's predicate in a fresh register.
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

    fn compare(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
        let ftz = m.take("ftz");
        let name = if m.parts.is_empty() { "" } else { m.parts.remove(0) };
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
        // Without a combination the comparison itself writes the destination.
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
            // The combining predicate may be the destination: the second result is made first.
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

    fn testp(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let name = if m.parts.is_empty() { "" } else { m.parts.remove(0) };
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

    fn select(&mut self, root: &str, s: &Statement, m: &mut Mods) -> Decode {
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

    fn cvta(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    /// `cvt.d.s`: the source normalised to 32 or 64 bits, converted, cut to the destination.
    fn convert(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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
            let other = m.ty()?;
            return match other {
                Ty::F32 if satfinite && !relu => {
                    self.bin32(if e4m3 { Binary32::F32ToE4m3x2 } else { Binary32::F32ToE5m2x2 }, s, Ty::F32)
                }
                Ty::F16x2 if !satfinite && !relu => {
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
        // Between floating-point types.
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
                let brain = to == Ty::Bf16;
                if from == Ty::F64 {
                    let a = self.a64(s, 1, from)?;
                    self.push(Op::Narrow(half_rounding(brain, round, satfinite), d, a));
                } else {
                    let a = self.a32(s, 1, from)?;
                    let a = self.as_f32(a, from, ftz);
                    self.narrow_half(d, a, brain, round, satfinite);
                }
                if relu {
                    self.push(Op::Unary32(if brain { Unary32::ReluBf16 } else { Unary32::ReluF16 }, d, d));
                }
                if saturate {
                    return Err("`.sat` to a 16-bit float is unknown".into());
                }
                Ok(())
            }
            _ => Err("this conversion is unknown".into()),
        }
    }

    /// f32 to f16 or bf16.
    fn narrow_half(&mut self, d: R, a: R, brain: bool, round: Round, satfinite: bool) {
        if round == Round::Nearest && !satfinite {
            self.push(Op::Unary32(if brain { Unary32::F32ToBf16 } else { Unary32::F32ToF16 }, d, a));
        } else {
            let wide = self.temp(Class::R64);
            self.push(Op::Widen(Widen::F32ToF64, wide, a));
            self.push(Op::Narrow(half_rounding(brain, round, satfinite), d, wide));
        }
    }

    fn convert_pair(&mut self, s: &Statement, to: Ty, round: Option<Round>, relu: bool, satfinite: bool) -> Decode {
        let brain = to == Ty::Bf16x2;
        let round = round.unwrap_or(Round::Nearest);
        if round == Round::Nearest && !relu && !satfinite {
            return self.bin32(if brain { Binary32::F32ToBf16x2 } else { Binary32::F32ToF16x2 }, s, Ty::F32);
        }
        let (d, a, b) = (self.d32(s)?, self.a32(s, 1, Ty::F32)?, self.a32(s, 2, Ty::F32)?);
        let halves = [self.temp(Class::R32), self.temp(Class::R32)];
        for (half, source) in halves.into_iter().zip([b, a]) {
            self.narrow_half(half, source, brain, round, satfinite);
            if relu {
                self.push(Op::Unary32(if brain { Unary32::ReluBf16 } else { Unary32::ReluF16 }, half, half));
            }
        }
        self.push(Op::Binary32(Binary32::Pack16, d, halves[0], halves[1]));
        Ok(())
    }

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

    /// Source 1 of an integer conversion, sign- or zero-extended to 64 bits from its type's width.
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

    /// Source 1 of at most 32 bits, sign- or zero-extended to 32 bits.
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

    /// Writes a 32-bit integer, already right in its low bits, to the destination of an integer conversion.
    fn put_integer(&mut self, s: &Statement, to: Ty, value: R) -> Decode {
        match self.operand(s, 0)?.clone() {
            Operand::Reg(Reg { class: Class::R64, index, .. }) => {
                // A destination wider than its type is extended by the type's sign.
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
            // In signed 64-bit arithmetic; an unsigned 64-bit source above its range is large already.
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
        // Sign extension of the source matters only for wider destinations; the low bits are the same.
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

    /// Rounded to an integer, then saturated to the destination's range.
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

    fn load_store(&mut self, store: bool, s: &Statement, m: &mut Mods) -> Decode {
        m.memory_words();
        let hint = m.take("L2::cache_hint");
        let space = m.space()?;
        let lanes = m.find(|part| part.strip_prefix('v').and_then(|n| n.parse::<usize>().ok())).unwrap_or(1);
        let ty = m.ty()?;
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
        let access = Box::new(Access { space, address, width, signed: ty.signed(), slots });
        self.push(if store { Op::Store(access) } else { Op::Load(access) });
        Ok(())
    }

    fn atomic(&mut self, old: bool, s: &Statement, m: &mut Mods) -> Decode {
        m.memory_words();
        let hint = m.take("L2::cache_hint");
        let space = m.space()?;
        let lanes = m.find(|part| part.strip_prefix('v').and_then(|n| n.parse::<usize>().ok())).unwrap_or(1);
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

    fn fence(&mut self, m: &mut Mods) -> Decode {
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

    fn shuffle(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    fn vote(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    fn match_sync(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    fn redux(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    fn barrier(&mut self, bar: bool, s: &Statement, m: &mut Mods) -> Decode {
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

    fn mbarrier(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    fn bulk(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("async") || !m.take("bulk") {
            return Err("of `cp` only `cp.async.bulk` is known".into());
        }
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

    fn wgmma(&mut self, s: &Statement, m: &mut Mods) -> Decode {
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

    fn matrix(&mut self, store: bool, s: &Statement, m: &mut Mods) -> Decode {
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

fn half_rounding(brain: bool, round: Round, satfinite: bool) -> Narrow {
    match (brain, round, satfinite) {
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

/// Least and greatest value of an integer type, as far as 63 bits go.
fn integer_range(ty: Ty) -> (i64, i64) {
    let bits = ty.bits();
    if ty.signed() {
        (i64::MIN >> (64 - bits), i64::MAX >> (64 - bits))
    } else {
        (0, if bits >= 63 { i64::MAX } else { (1 << bits) - 1 })
    }
}

/// Special registers that are set when a warp starts.
fn special(name: &str) -> Option<Special> {
    let axis = |axis: &str| match axis {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    let (register, dimension) =
        name.strip_prefix('%')?.split_once('.').map_or((&name[1..], None), |(r, d)| (r, axis(d)));
    Some(match (register, dimension) {
        ("tid", Some(d)) => Special::Tid(d),
        ("ntid", Some(d)) => Special::Ntid(d),
        ("ctaid", Some(d)) => Special::Ctaid(d),
        ("nctaid", Some(d)) => Special::Nctaid(d),
        ("cluster_ctaid" | "clusterid", Some(_)) | ("cluster_ctarank", None) => Special::Zero,
        ("cluster_nctaid", Some(_)) | ("cluster_nctarank", None) => Special::One,
        ("laneid", None) => Special::LaneId,
        ("warpid", None) => Special::WarpId,
        ("nwarpid", None) => Special::NwarpId,
        ("smid", None) => Special::SmId,
        ("nsmid", None) => Special::NsmId,
        ("lanemask_eq", None) => Special::LanemaskEq,
        ("lanemask_le", None) => Special::LanemaskLe,
        ("lanemask_lt", None) => Special::LanemaskLt,
        ("lanemask_ge", None) => Special::LanemaskGe,
        ("lanemask_gt", None) => Special::LanemaskGt,
        ("dynamic_smem_size", None) => Special::DynamicSmem,
        ("total_smem_size", None) => Special::TotalSmem,
        _ => return None,
    })
}
