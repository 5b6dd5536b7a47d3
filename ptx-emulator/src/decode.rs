//! From statements to operations: what each opcode and modifier means. Whatever is unknown is an
//! error that names it.
//!
//! This file has the registers, the operands and the table of opcodes. The modules below have the
//! instructions by subject. Those of tensor cores are in [`crate::tensor_core`], one module a
//! family.

use crate::alu::*;
use crate::fault::{Error, shorten};
use crate::float::Round;
use crate::isa::*;
use crate::parse::{Class, Entry, Operand, Reg, Statement, Variable, VariableSpace};
use crate::tensor_core::wgmma;
use std::collections::HashMap;

mod arithmetic;
mod barriers;
mod convert;
mod copies;
mod lanes;
mod memory;
mod target;

pub(crate) use target::Target;

/// The fundamental types of PTX; untyped bits and integers with their width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ty {
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

/// What a step of the decoder returns. An error has no line yet: [`Decoder::statement`] adds it.
pub(crate) type Decode<T = ()> = Result<T, String>;

/// The modifiers of an opcode: its parts behind the first. They are taken one by one, and what is
/// left in the end is unknown.
pub(crate) struct Mods<'a> {
    pub parts: Vec<&'a str>,
}

impl<'a> Mods<'a> {
    /// Takes the first modifier. It is empty if there is none.
    pub fn first(&mut self) -> &'a str {
        if self.parts.is_empty() { "" } else { self.parts.remove(0) }
    }

    /// Takes a modifier wherever it stands. Tells whether it was there.
    pub fn take(&mut self, name: &str) -> bool {
        match self.parts.iter().position(|part| *part == name) {
            Some(at) => {
                self.parts.remove(at);
                true
            }
            None => false,
        }
    }

    /// Takes the first modifier for which `find` knows a meaning.
    pub fn find<T>(&mut self, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (at, found) = self.parts.iter().enumerate().find_map(|(at, part)| find(part).map(|found| (at, found)))?;
        self.parts.remove(at);
        Some(found)
    }

    pub fn ty(&mut self) -> Decode<Ty> {
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

    /// Takes the words of the memory model and cache hints, and tells whether the access is strong.
    /// They change nothing else, because every access takes effect in order.
    fn memory_words(&mut self) -> bool {
        const STRONG: [&str; 6] = ["relaxed", "acquire", "release", "acq_rel", "volatile", "mmio"];
        const KNOWN: [&str; 21] = [
            "weak",
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
        let strong = self.parts.iter().any(|part| STRONG.contains(part));
        self.parts.retain(|part| {
            let l2 = part.starts_with("L2::") && *part != "L2::cache_hint";
            !(STRONG.contains(part) || KNOWN.contains(part) || l2)
        });
        strong
    }

    /// Takes the state space; without one, the address is generic.
    pub fn space(&mut self) -> Decode<Space> {
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

    /// Takes the number of elements of a vector access: `.v2`, `.v4`, `.v8`, or 1 without any.
    fn vector(&mut self) -> usize {
        let count = |part: &str| match part {
            "v2" => Some(2),
            "v4" => Some(4),
            "v8" => Some(8),
            _ => None,
        };
        self.find(count).unwrap_or(1)
    }

    fn done(self) -> Decode {
        match self.parts.first() {
            None => Ok(()),
            Some(part) => Err(format!("unknown modifier `.{part}`")),
        }
    }
}

/// The state while one entry is decoded.
pub(crate) struct Decoder<'a> {
    module: &'a str,
    target: &'a Target,
    entry: &'a Entry,
    /// The address of each symbol, in the space of its kind.
    symbols: HashMap<&'a str, u64>,
    code: Vec<Inst>,
    /// How many registers each file has so far.
    registers: [u32; 3],
    /// Registers that hold a constant or a special register, by what they hold.
    constants32: HashMap<u32, R>,
    constants64: HashMap<u64, R>,
    specials: HashMap<Special, R>,
    true_predicate: R,
    /// The condition code of `add.cc` and its kin, once a statement has used it.
    carry: Option<R>,
    pub has_wgmma: bool,
}

/// Gives a variable an address in static shared memory. So far that is used up to `end`, which
/// moves on.
pub(crate) fn place_shared(module: &str, variable: &Variable, end: &mut u32) -> Result<u64, Error> {
    let address = (*end as u64).next_multiple_of(variable.align.max(1));
    let behind = address + variable.bytes.unwrap_or(0);
    if behind > (SHARED_BASE + MAX_SHARED) as u64 {
        let bytes = behind - SHARED_BASE as u64;
        let what = format!("`{}` ends at {bytes} bytes of shared memory: a block has {MAX_SHARED}", variable.name);
        return Err(Error::at(module, variable.line, what));
    }
    *end = behind as u32;
    Ok(address)
}

/// Decodes one entry. `symbols` has the addresses of the module's variables. `shared_used` is where
/// the shared memory of these ends and that of the entry begins.
pub(crate) fn decode(
    module: &str,
    target: &Target,
    entry: &Entry,
    symbols: &HashMap<String, u64>,
    shared_used: u32,
) -> Result<Kernel, Error> {
    let mut symbols: HashMap<&str, u64> = symbols.iter().map(|(name, address)| (name.as_str(), *address)).collect();
    for (param, offset) in &entry.params {
        symbols.insert(&param.name, *offset);
    }
    let (mut shared, mut local, mut dynamic_align) = (shared_used, 0u64, 16);
    let mut dynamic = Vec::new();
    for variable in &entry.variables {
        let align = variable.align.max(1);
        let address = match (variable.space, variable.bytes) {
            (VariableSpace::Shared, Some(_)) => place_shared(module, variable, &mut shared)?,
            (VariableSpace::Local, Some(bytes)) => {
                let address = local.next_multiple_of(align);
                local = address + bytes;
                if local > MAX_LOCAL {
                    let what =
                        format!("`{}` ends at {local} bytes of local memory: a thread has {MAX_LOCAL}", variable.name);
                    return Err(Error::at(module, variable.line, what));
                }
                address
            }
            (_, None) => {
                dynamic_align = dynamic_align.max(align as u32);
                dynamic.push(variable.name.as_str());
                0
            }
            _ => {
                let what = format!("`{}` cannot stand in a body: only .shared and .local variables can", variable.name);
                return Err(Error::at(module, variable.line, what));
            }
        };
        symbols.insert(&variable.name, address);
    }
    for name in dynamic {
        symbols.insert(name, (shared as u64).next_multiple_of(dynamic_align as u64));
    }
    let mut decoder = Decoder {
        module,
        target,
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
    // A kernel that runs to the end of its body returns.
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
        fragment_uses = wgmma::mark(&mut decoder.code, decoder.registers[Class::R32 as usize] as usize, &constants);
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

impl<'a> Decoder<'a> {
    /// Adds a register to a file.
    fn temp(&mut self, class: Class) -> R {
        let file = &mut self.registers[class as usize];
        *file += 1;
        *file - 1
    }

    /// A register that holds a constant.
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

    /// Adds an operation; [`Decoder::statement`] fills in the rest.
    pub fn push(&mut self, op: Op) {
        self.code.push(Inst { op, guard: NO_GUARD, statement: 0, first: false, fragment: NO_FRAGMENT });
    }

    /// Decodes a statement, and gives its operations their guard and their place in the text.
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
            // The guard is copied first, because one of the operations may overwrite it.
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

    pub fn operand<'s>(&self, s: &'s Statement, i: usize) -> Decode<&'s Operand> {
        s.operands.get(i).ok_or_else(|| format!("operand {} is missing", i + 1))
    }

    pub fn reg(&self, operand: &Operand, class: Class) -> Decode<Reg> {
        match operand {
            Operand::Reg(reg) if reg.class == class => Ok(*reg),
            Operand::Reg(reg) => Err(format!("a register of {} bits stands where {class:?} is needed", reg.bits)),
            other => Err(format!("{other:?} stands where a register is needed")),
        }
    }

    /// The destination register. A sink (`_`) gets a new register that nobody reads.
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
            Some(address) => Ok(address.wrapping_add(offset as u64)),
            None => Err(format!("`{name}` is not declared")),
        }
    }

    /// A register that holds a source of up to 32 bits.
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

    /// A register that holds a source of 64 bits.
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

    pub fn a64(&mut self, s: &Statement, i: usize, ty: Ty) -> Decode<R> {
        let operand = self.operand(s, i)?.clone();
        self.read64(&operand, ty)
    }

    fn u32_at(&mut self, s: &Statement, i: usize) -> Decode<R> {
        self.a32(s, i, Ty::U(32))
    }

    /// A predicate, and whether it is negated. Immediates are allowed.
    pub fn predicate(&mut self, operand: &Operand) -> Decode<(R, bool)> {
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

    /// A register that holds a predicate's value, negation included.
    fn plain_predicate(&mut self, operand: &Operand) -> Decode<R> {
        let (p, negated) = self.predicate(operand)?;
        if !negated {
            return Ok(p);
        }
        let inverse = self.temp(Class::Pred);
        self.push(Op::Pred(PredOp::Not, inverse, p, p));
        Ok(inverse)
    }

    pub fn immediate(&self, s: &Statement, i: usize) -> Decode<i64> {
        match self.operand(s, i)? {
            Operand::Int(value) => Ok(*value),
            other => Err(format!("operand {} must be an immediate, found {other:?}", i + 1)),
        }
    }

    pub fn address(&mut self, s: &Statement, i: usize, space: Space) -> Decode<Address> {
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
                Address { base: Base::None, offset: address.wrapping_add(*offset) }
            }
            Operand::Int(value) => Address { base: Base::None, offset: value.wrapping_add(*offset) },
            other => return Err(format!("{other:?} cannot be the base of an address in {} memory", space.name())),
        })
    }

    /// The elements of a vector operand; another operand is its own only element.
    pub fn elements(operand: &Operand) -> Vec<Operand> {
        match operand {
            Operand::Vector(elements) => elements.clone(),
            other => vec![other.clone()],
        }
    }

    /// A register of a load (with `store`, of a store).
    fn slot(&mut self, operand: &Operand, ty: Ty, store: bool) -> Decode<Slot> {
        Ok(match operand {
            Operand::Reg(Reg { class: Class::R32, index, bits }) if *bits as u32 >= ty.bits().min(64) => {
                Slot::R32(*index, *bits)
            }
            Operand::Reg(Reg { class: Class::R64, index, .. }) => Slot::R64(*index),
            Operand::Sink if !store => Slot::Sink,
            other if store && ty.bits() == 64 => Slot::R64(self.read64(other, ty)?),
            other if store => Slot::R32(self.read32(other, ty)?, 32),
            other => return Err(format!("{other:?} cannot be loaded to")),
        })
    }

    fn instruction(&mut self, s: &Statement) -> Decode {
        self.target.check(s)?;
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
            // A cluster has one block here, so that an address maps to itself.
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
            "elect" => self.elect(s, &mut m)?,
            "bar" | "barrier" => self.barrier(root == "bar", s, &mut m)?,
            "mbarrier" => self.mbarrier(s, &mut m)?,
            "cp" => self.copy(s, &mut m)?,
            "wgmma" => self.wgmma(s, &mut m)?,
            "mma" => self.mma_sync(s, &mut m)?,
            "ldmatrix" | "stmatrix" => self.matrix_move(root == "stmatrix", s, &mut m)?,
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

    /// The two parts of an operand `a|b`, or a single operand.
    fn pair(&self, s: &Statement, i: usize) -> Decode<(Operand, Option<Operand>)> {
        Ok(match self.operand(s, i)? {
            Operand::Pair(a, b) => ((**a).clone(), Some((**b).clone())),
            single => (single.clone(), None),
        })
    }

    /// The statement that a label stands before.
    fn target(&self, s: &Statement, i: usize) -> Decode<u32> {
        match self.operand(s, i)? {
            Operand::Name(name, 0) => {
                self.entry.label(s, name).map(|at| at as u32).ok_or_else(|| format!("no label `{name}` in reach"))
            }
            other => Err(format!("{other:?} stands where a label is needed")),
        }
    }
}

/// The special register of a name, among those that are set when a warp starts.
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
