//! A check of the finished PTX: the lanes of a warp are together wherever an instruction needs all
//! of them.
//!
//! All lanes of a warp execute `shfl.sync`, `bar.sync`, `wgmma` and others at once. A compiler that
//! does not know this may copy such an instruction into both sides of a branch that parts the
//! lanes. Then the warp waits for ever, or reads what is not there. The finishing step says
//! `convergent` to LLVM, but rustc's own optimiser has no such word. An incremental build does not
//! inline, and in one its jump threading copied the calls of `exchange` like this:
//!
//! ```text
//! let a = if odd { x } else { y };
//! let a = exchange(a);
//! if odd { x = a } else { y = a }
//!
//! became
//!
//! if odd { a = exchange(x); x = a } else { a = exchange(y); y = a }
//! ```
//!
//! All consumer warps of attention waited there. So no pass is trusted, and the result is checked.
//!
//! A register is **uniform** if all lanes of a warp have the same value in it. These values are not
//! uniform, nor is what is computed from them:
//!
//! * the thread's number,
//! * results of atomics, of `elect` and of waiting for a barrier,
//! * results of unknown instructions.
//!
//! These values are uniform again:
//!
//! * results of votes and of `redux`,
//! * a value that one lane broadcasts,
//! * the bits of the thread's number that count warps.
//!
//! A load from a uniform address counts as uniform. If its value may change while the lanes read
//! it, the author must broadcast it.
//!
//! A branch on a value that is not uniform parts the lanes. They are together again in the block
//! that every way from the branch leads through, its immediate post-dominator. Between the two, an
//! instruction for all lanes is an error, and a register that is written there is not uniform
//! afterwards. Ways into a `trap` do not count, because nothing follows it. Instructions whose mask
//! names only some lanes are not checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::ptx::{opcode, statements};

/// An instruction for all lanes of a warp that stands where the lanes may be apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parted {
    /// The entry or function that it stands in.
    pub function: String,
    /// The line of the instruction, from 1, and its text.
    pub instruction: (usize, String),
    /// The line and the text of the branch or predicate that may part the lanes. `None` in a
    /// function that is called, by any lanes, and where no way leads to the end of the kernel.
    pub cause: Option<(usize, String)>,
}

impl fmt::Display for Parted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some instructions name a hundred registers, which would hide the rest of the message.
        let short =
            |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(60).collect::<String>();
        let (line, instruction) = &self.instruction;
        write!(
            f,
            "`{}` in line {line} of the PTX, in `{}`, takes all lanes of a warp, but ",
            short(instruction),
            self.function
        )?;
        match &self.cause {
            Some((line, cause)) => write!(
                f,
                "`{}` in line {line} may part them: move it out of the branch, or make the condition one value for the warp with \
                 `cuda::warp::uniform`",
                short(cause)
            ),
            None => f.write_str(
                "no way leads from there to the end of a kernel: mark a function that is called #[inline(always)], and end the loop",
            ),
        }
    }
}

/// The instructions of a module whose lanes may be apart. Of each branch only the first is named.
pub fn parted(ptx: &str) -> Vec<Parted> {
    functions(&statements(ptx)).iter().flat_map(Function::parted).collect()
}

/// What is known of a value in the lanes of a warp. Of two such facts the weaker one is the
/// greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Value {
    /// The value is the same in every lane.
    #[default]
    Uniform,
    /// The value is (32 u + lane) << shift, where u is the same in every lane, or it is uniform.
    Lane(u32),
    /// The value may be anything.
    Divergent,
}

impl Value {
    /// What is known of a value that may be either of two.
    fn or(self, other: Value) -> Value {
        match (self, other) {
            (Value::Lane(one), Value::Lane(two)) if one != two => Value::Divergent,
            _ => self.max(other),
        }
    }
}

/// One instruction.
struct Instruction<'a> {
    line: usize,
    text: &'a str,
    /// The register that decides whether it is executed.
    predicate: Option<&'a str>,
    opcode: &'a str,
    operands: Vec<&'a str>,
}

/// Instructions that are executed one after the other, and the blocks that may follow them.
#[derive(Default)]
struct Block<'a> {
    instructions: Vec<Instruction<'a>>,
    next: Vec<usize>,
}

impl<'a> Block<'a> {
    /// Registers that are copies at the end of the block, each with its original: a register or a
    /// constant.
    fn copies(&self) -> BTreeMap<&'a str, &'a str> {
        let mut copies: BTreeMap<&str, &str> = BTreeMap::new();
        for instruction in &self.instructions {
            for written in instruction.written() {
                copies.retain(|copy, original| *copy != written && *original != written);
            }
            if let ("mov", None, [copy, original]) =
                (instruction.kind(), instruction.predicate, &instruction.operands[..])
                && !copy.starts_with('{')
            {
                copies.insert(copy, original);
            }
        }
        copies
    }
}

struct Function<'a> {
    name: String,
    is_entry: bool,
    blocks: Vec<Block<'a>>,
}

/// The functions of a module that have a body.
fn functions(statements: &[(usize, String)]) -> Vec<Function<'_>> {
    let mut found = Vec::new();
    let mut rest = statements;
    while let [(_, head), tail @ ..] = rest {
        rest = tail;
        let is_function = head.starts_with('.') && [".entry", ".func"].iter().any(|word| has_word(head, word));
        if is_function && tail.first().is_some_and(|(_, text)| text == "{") {
            let mut depth = 0;
            let length = tail.iter().position(|(_, text)| {
                depth += i32::from(text == "{") - i32::from(text == "}");
                depth == 0
            });
            let (body, behind) = tail.split_at(length.unwrap_or(tail.len()));
            found.push(Function::read(head, body));
            rest = behind;
        }
    }
    found
}

fn has_word(text: &str, word: &str) -> bool {
    text.split_whitespace().any(|found| found == word)
}

impl<'a> Function<'a> {
    fn read(head: &str, body: &'a [(usize, String)]) -> Function<'a> {
        let is_entry = has_word(head, ".entry");
        // In `.visible .func (.param .b32 result) name(...)` the result stands before the name.
        let behind =
            head.split_once(if is_entry { ".entry" } else { ".func" }).map_or("", |(_, behind)| behind.trim_start());
        let behind =
            behind.strip_prefix('(').and_then(|list| list.split_once(')')).map_or(behind, |(_, behind)| behind);
        let name = behind.trim_start().split('(').next().unwrap_or("").trim().to_string();
        let mut blocks = vec![Block::default()];
        // A label counts within its braces. Inline assembly repeats the same label in braces of its
        // own.
        let (mut scopes, mut next_scope) = (vec![0], 1);
        let mut labels: BTreeMap<(usize, &str), usize> = BTreeMap::new();
        let mut jumps: Vec<(usize, Vec<usize>, &'a str)> = Vec::new();
        let mut tables: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (line, statement) in body {
            match statement.as_str() {
                "{" => {
                    scopes.push(next_scope);
                    next_scope += 1;
                }
                "}" => _ = scopes.pop(),
                _ => {}
            }
            let mut text = statement.trim();
            while let Some((label, behind)) = text.split_once(char::is_whitespace).or(Some((text, "")))
                && let Some(label) = label.strip_suffix(':')
            {
                let last = blocks.len() - 1;
                if !blocks[last].instructions.is_empty() {
                    blocks[last].next.push(last + 1);
                    blocks.push(Block::default());
                }
                labels.insert((scopes.last().copied().unwrap_or(0), label), blocks.len() - 1);
                text = behind.trim_start();
                if let Some(list) = text.strip_prefix(".branchtargets") {
                    tables.insert(label, list.split(',').map(str::trim).collect());
                }
            }
            let Some(instruction) = Instruction::read(*line, text) else { continue };
            let last = blocks.len() - 1;
            let (kind, predicated) = (instruction.kind(), instruction.predicate.is_some());
            match kind {
                "bra" => jumps.extend(instruction.operands.first().map(|label| (last, scopes.clone(), *label))),
                "brx" => {
                    let targets = instruction.operands.get(1).and_then(|table| tables.get(table)).into_iter().flatten();
                    jumps.extend(targets.map(|label| (last, scopes.clone(), *label)));
                }
                _ => {}
            }
            blocks[last].instructions.push(instruction);
            if matches!(kind, "bra" | "brx" | "ret" | "exit" | "trap") {
                // Behind a branch that is always taken stands a label, or code that is never
                // reached.
                if predicated {
                    blocks[last].next.push(last + 1);
                }
                if predicated && matches!(kind, "ret" | "exit") {
                    blocks[last].next.push(usize::MAX);
                }
                blocks.push(Block::default());
            }
        }
        for (block, scopes, label) in jumps {
            let target = scopes.iter().rev().find_map(|scope| labels.get(&(*scope, label)));
            blocks[block].next.extend(target);
        }
        let exit = blocks.len();
        for block in &mut blocks {
            let last = block.instructions.last().map_or("", Instruction::kind);
            if block.next.is_empty() && last != "trap" {
                block.next.push(exit);
            }
            block.next.iter_mut().for_each(|next| *next = (*next).min(exit));
        }
        Function { name, is_entry, blocks }
    }

    fn parted(&self) -> Vec<Parted> {
        let found = |instruction: &Instruction, cause: Option<&Instruction>| {
            let said = |instruction: &Instruction| (instruction.line, instruction.text.to_string());
            Parted { function: self.name.clone(), instruction: said(instruction), cause: cause.map(said) }
        };
        let all = || self.blocks.iter().flat_map(|block| &block.instructions);
        if !self.is_entry {
            return all()
                .find(|instruction| instruction.is_for_all_lanes())
                .map(|first| found(first, None))
                .into_iter()
                .collect();
        }
        let post_dominators = self.post_dominators();
        let mut known: BTreeMap<&str, Value> = BTreeMap::new();
        // For each block, the blocks whose branches may part its lanes.
        let mut apart: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); self.blocks.len()];
        let copies: Vec<_> = self.blocks.iter().map(Block::copies).collect();
        // Values begin as uniform and only ever become weaker, so the loop ends.
        loop {
            let before = (known.clone(), apart.clone());
            for (index, block) in self.blocks.iter().enumerate() {
                let mut here: BTreeMap<&str, Value> = BTreeMap::new();
                for instruction in &block.instructions {
                    let value = instruction.value(|register| value_of(register, &here, &known));
                    here.extend(instruction.written().map(|register| (register, value)));
                }
                if let Some(last) = block.instructions.last()
                    && last.chooses().any(|register| value_of(register, &here, &known) != Value::Uniform)
                {
                    for parted in self.between(index, &post_dominators) {
                        apart[parted].insert(index);
                    }
                }
                for (register, value) in here {
                    // If the same copy was made before the branch, lanes that do not come here have
                    // it too.
                    let copy = copies[index].get(register);
                    let same =
                        apart[index].iter().all(|branch| copy.is_some() && copies[*branch].get(register) == copy);
                    let value = if same { value } else { Value::Divergent };
                    let known = known.entry(register).or_default();
                    *known = value.or(*known);
                }
            }
            if before.0 == known && before.1 == apart {
                break;
            }
        }
        let mut parted: Vec<Parted> = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let mut here: BTreeMap<&str, Value> = BTreeMap::new();
            for instruction in &block.instructions {
                let predicate = instruction.predicate.map(|register| value_of(register, &here, &known));
                let branch = apart[index].first().and_then(|branch| self.blocks[*branch].instructions.last());
                let cause = branch.or((predicate.unwrap_or_default() != Value::Uniform).then_some(instruction));
                if post_dominators[index].is_none() && instruction.is_for_all_lanes() {
                    parted.push(found(instruction, None));
                } else if let Some(cause) = cause.filter(|_| instruction.is_for_all_lanes())
                    && !parted.iter().any(|known| known.cause.as_ref().is_some_and(|(line, _)| *line == cause.line))
                {
                    parted.push(found(instruction, Some(cause)));
                }
                let value = instruction.value(|register| value_of(register, &here, &known));
                here.extend(instruction.written().map(|register| (register, value)));
            }
        }
        parted
    }

    /// The blocks that lanes may reach apart after the branch at the end of `branch`.
    fn between(&self, branch: usize, post_dominators: &[Option<usize>]) -> Vec<usize> {
        let together = post_dominators[branch];
        let mut reached = vec![false; self.blocks.len()];
        let mut open: Vec<usize> = self.ways(branch, post_dominators).collect();
        // A single way parts nobody.
        if open.len() < 2 {
            return Vec::new();
        }
        while let Some(block) = open.pop() {
            if Some(block) != together && block < self.blocks.len() && !reached[block] {
                reached[block] = true;
                open.extend(self.ways(block, post_dominators));
            }
        }
        (0..reached.len()).filter(|block| reached[*block]).collect()
    }

    /// The blocks that may follow a block. Those that only end in a trap are left out.
    fn ways(&self, block: usize, post_dominators: &[Option<usize>]) -> impl Iterator<Item = usize> {
        let exit = self.blocks.len();
        self.blocks[block].next.iter().copied().filter(move |next| *next == exit || post_dominators[*next].is_some())
    }

    /// The immediate post-dominator of each block; `None` where no way leads to the exit, which
    /// counts as one block more. The algorithm is that of Cooper, Harvey and Kennedy (A simple,
    /// fast dominance algorithm, 2001) with all edges reversed.
    fn post_dominators(&self) -> Vec<Option<usize>> {
        let exit = self.blocks.len();
        let mut before = vec![Vec::new(); exit + 1];
        for (index, block) in self.blocks.iter().enumerate() {
            block.next.iter().for_each(|next| before[*next].push(index));
        }
        // The blocks in the order in which a walk back from the exit leaves them.
        let mut number = vec![None; exit + 1];
        let (mut order, mut walk, mut seen) = (Vec::new(), vec![(exit, 0)], vec![false; exit + 1]);
        seen[exit] = true;
        while let Some((block, step)) = walk.pop() {
            match before[block].get(step) {
                Some(&next) => {
                    walk.push((block, step + 1));
                    if !std::mem::replace(&mut seen[next], true) {
                        walk.push((next, 0));
                    }
                }
                None => {
                    number[block] = Some(order.len());
                    order.push(block);
                }
            }
        }
        let mut found = vec![None; exit + 1];
        found[exit] = Some(exit);
        let mut changed = true;
        while changed {
            changed = false;
            for &block in order.iter().rev().filter(|block| **block != exit) {
                let mut nearest = None;
                for &next in self.blocks[block].next.iter().filter(|next| found[**next].is_some()) {
                    nearest = Some(match nearest {
                        None => next,
                        Some(other) => common(&found, &number, other, next),
                    });
                }
                changed |= found[block] != nearest;
                found[block] = nearest;
            }
        }
        found
    }
}

/// The first block that post-dominates both `a` and `b`.
fn common(found: &[Option<usize>], number: &[Option<usize>], mut a: usize, mut b: usize) -> usize {
    while a != b {
        // The exit has the highest number, and each step goes towards it.
        let behind = if number[a] < number[b] { &mut a } else { &mut b };
        *behind = found[*behind].unwrap_or(found.len() - 1);
    }
    a
}

/// Value of a register in a block that has so far written the registers of `here`.
fn value_of(register: &str, here: &BTreeMap<&str, Value>, known: &BTreeMap<&str, Value>) -> Value {
    match register {
        // Blocks have one dimension, which `.maxntid` states.
        "%tid.x" | "%laneid" => Value::Lane(0),
        _ if ["%lanemask", "%clock", "%globaltimer"].iter().any(|prefix| register.starts_with(prefix)) => {
            Value::Divergent
        }
        _ => here.get(register).or_else(|| known.get(register)).copied().unwrap_or_default(),
    }
}

/// The names in an operand. Names of other things than registers do no harm, since nothing writes
/// them.
fn names(operand: &str) -> impl Iterator<Item = &str> {
    let words = operand.split(|c: char| !(c.is_ascii_alphanumeric() || "_$%.".contains(c)));
    words.filter(|word| word.starts_with(|c: char| !c.is_ascii_digit() && c != '.'))
}

/// The integer that an operand is.
fn constant(operand: &str) -> Option<i64> {
    let (sign, digits) = operand.strip_prefix('-').map_or((1, operand), |digits| (-1, digits));
    let value = match digits.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits.trim_end_matches('U'), 16).ok()?,
        None => digits.parse().ok()?,
    };
    Some(sign * value)
}

impl<'a> Instruction<'a> {
    fn read(line: usize, text: &'a str) -> Option<Instruction<'a>> {
        let opcode = opcode(text)?;
        let (head, operands) = text.split_once(opcode)?;
        let predicate = head.trim().strip_prefix('@').map(|guard| guard.trim_start_matches('!').trim());
        // Commas divide the operands, but not those within brackets and braces.
        let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
        for (at, character) in operands.char_indices() {
            match character {
                '[' | '{' | '(' => depth += 1,
                ']' | '}' | ')' => depth -= 1,
                ',' if depth == 0 => {
                    parts.push(operands[start..at].trim());
                    start = at + 1;
                }
                _ => {}
            }
        }
        parts.push(operands[start..].trim());
        Some(Instruction { line, text, predicate, opcode, operands: parts })
    }

    /// The first word of the opcode.
    fn kind(&self) -> &'a str {
        self.opcode.split('.').next().unwrap_or("")
    }

    fn has(&self, modifier: &str) -> bool {
        self.opcode.split('.').any(|word| word == modifier)
    }

    /// Whether the mask names all lanes. It is the last operand of an instruction that exchanges
    /// registers.
    fn names_all_lanes(&self) -> bool {
        self.operands.last().and_then(|mask| constant(mask)).is_some_and(|mask| mask as u32 == u32::MAX)
    }

    /// Whether all lanes of a warp must execute it together.
    fn is_for_all_lanes(&self) -> bool {
        match self.kind() {
            "barrier" => self.has("aligned"),
            "bar" if self.has("warp") => self.names_all_lanes(),
            "bar" | "setmaxnreg" => true,
            "shfl" | "vote" | "redux" | "match" | "elect" => self.has("sync") && self.names_all_lanes(),
            _ => self.has("sync"),
        }
    }

    /// The registers that decide where a branch goes.
    fn chooses(&self) -> impl Iterator<Item = &'a str> {
        let index = self.operands.first().filter(|_| self.kind() == "brx");
        let branches = matches!(self.kind(), "bra" | "brx" | "ret" | "exit");
        self.predicate.filter(|_| branches).into_iter().chain(index.into_iter().flat_map(|operand| names(operand)))
    }

    /// The registers that it writes. They stand first, unless the first operand is an address in
    /// brackets.
    fn written(&self) -> impl Iterator<Item = &'a str> {
        let nothing = match self.kind() {
            "bar" | "barrier" => !self.has("red"),
            "st" | "bra" | "brx" | "nanosleep" => true,
            _ => false,
        };
        let first = self.operands.first().filter(|operand| !nothing && !operand.starts_with('['));
        first.into_iter().flat_map(|operand| names(operand))
    }

    /// What is known of the value that it writes.
    fn value(&self, value_of: impl Fn(&str) -> Value) -> Value {
        let of =
            |operands: &[&str]| operands.iter().flat_map(|operand| names(operand)).map(&value_of).reduce(Value::or);
        let sources = of(self.operands.get(1..).unwrap_or_default()).unwrap_or_default();
        let operand = |index: usize| self.operands.get(index).copied().unwrap_or("");
        let result = match (self.kind(), sources) {
            ("vote" | "redux", _) if self.names_all_lanes() => Value::Uniform,
            ("bar" | "barrier", _) => Value::Uniform,
            // All lanes get the value of one lane, as the segment is the whole warp.
            ("shfl", _) if self.has("idx") && self.names_all_lanes() && operand(3) == "31" => {
                of(&[operand(2)]).unwrap_or_default()
            }
            ("shfl", Value::Uniform) if self.names_all_lanes() => Value::Uniform,
            ("ld", Value::Uniform) if !self.has("local") => Value::Uniform,
            (kind, Value::Uniform) if COMPUTES.contains(&kind) => Value::Uniform,
            (kind, Value::Lane(shift)) => self.of_lane(kind, shift),
            _ => Value::Divergent,
        };
        // Where the predicate is false, the old value stays.
        match self.predicate.map(&value_of) {
            None => result,
            Some(Value::Uniform) => self.written().map(&value_of).fold(result, Value::or),
            Some(_) => Value::Divergent,
        }
    }

    /// What is known of the result, if the operand is `(32 u + lane) << shift`. Its bits from
    /// `shift + 5` on are the same in all lanes. So all lanes are on the same side of any multiple
    /// of `1 << (shift + 5)`.
    fn of_lane(&self, kind: &str, shift: u32) -> Value {
        let pieces = self.operands.iter().any(|operand| operand.contains('{')) || self.opcode.contains(".f");
        let number = self.operands.get(2).and_then(|operand| constant(operand));
        let (group, by) = (1i64 << (shift + 5), number.and_then(|number| u32::try_from(number).ok()));
        match (kind, number) {
            _ if pieces => Value::Divergent,
            ("mov" | "cvt", _) => Value::Lane(shift),
            ("shl", _) => by.filter(|by| shift + by < 27).map_or(Value::Divergent, |by| Value::Lane(shift + by)),
            ("shr" | "bfe", _) if by.is_some_and(|by| by >= shift + 5) => Value::Uniform,
            ("shr", _) => by.and_then(|by| shift.checked_sub(by)).map_or(Value::Divergent, Value::Lane),
            ("and", Some(mask)) if mask % group == 0 => Value::Uniform,
            ("and", Some(mask)) if mask >> shift & 31 == 31 => Value::Lane(shift),
            ("add" | "sub" | "or", Some(number)) if number % group == 0 => Value::Lane(shift),
            // `lt` and `ge` ask whether a lane's number lies below the bound, rounded up. `gt` and
            // `le` ask the same of the next number.
            ("setp", Some(number)) if self.has("lt") || self.has("ge") => bound((number + (1 << shift) - 1) >> shift),
            ("setp", Some(number)) if self.has("gt") || self.has("le") => bound((number >> shift) + 1),
            _ => Value::Divergent,
        }
    }
}

/// Uniform if all lanes of a warp are on the same side of a bound of `lanes`: none is below it, or
/// all.
fn bound(lanes: i64) -> Value {
    if lanes % 32 == 0 { Value::Uniform } else { Value::Divergent }
}

/// Instructions whose result depends on nothing but their operands.
const COMPUTES: &[&str] = &[
    "abs", "add", "addc", "and", "bfe", "bfi", "bfind", "bmsk", "brev", "clz", "cnot", "copysign", "cos", "cvt",
    "cvta", "div", "dp2a", "dp4a", "ex2", "fma", "fns", "lg2", "lop3", "mad", "madc", "max", "min", "mov", "mul",
    "mul24", "neg", "not", "or", "popc", "prmt", "rcp", "rem", "rsqrt", "sad", "selp", "set", "setp", "shf", "shl",
    "shr", "sin", "slct", "sqrt", "sub", "subc", "tanh", "testp", "xor",
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with an entry of this body: the instruction, and what parts the lanes.
    fn wrong(body: &str) -> Vec<(String, String)> {
        let ptx = format!(
            ".version 8.3\n.visible .entry f(\n\t.param .u64 f_param_0\n)\n.maxntid 256, 1, 1\n{{\n{body}\n\tret;\n}}\n"
        );
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let found = parted(&ptx);
        assert!(found.iter().all(|parted| parted.function == "f"), "{found:?}");
        found
            .iter()
            .map(|p| (words(&p.instruction.1), p.cause.as_ref().map_or(String::new(), |(_, text)| words(text))))
            .collect()
    }

    #[track_caller]
    fn refused(body: &str, instruction: &str, cause: &str) {
        assert_eq!(wrong(body), [(instruction.to_string(), cause.to_string())], "{body}");
    }

    #[track_caller]
    fn accepted(body: &str) {
        assert_eq!(wrong(body), [], "{body}");
    }

    const EXCHANGE: &str = "shfl.sync.bfly.b32 %r9, %r8, 1, 31, -1";

    #[test]
    fn what_is_for_all_lanes_may_not_stand_where_they_are_apart() {
        let odd = "mov.u32 %r1, %laneid;\nand.b32 %r2, %r1, 1;\nsetp.eq.b32 %p1, %r2, 0;\n";
        // rustc's jump threading makes two of one exchange before the branches come together.
        let twice = format!("{odd}@%p1 bra $L1;\n{EXCHANGE};\nbra.uni $L2;\n$L1:\n{EXCHANGE};\n$L2:");
        refused(&twice, EXCHANGE, "@%p1 bra $L1");
        accepted(&format!(
            "{odd}@%p1 bra $L1;\nmov.b32 %r8, %r3;\nbra.uni $L2;\n$L1:\nmov.b32 %r8, %r4;\n$L2:\n{EXCHANGE};"
        ));
        for collective in [
            "bar.sync 0",
            "bar.warp.sync -1",
            "wgmma.fence.sync.aligned",
            "setmaxnreg.dec.sync.aligned.u32 24",
            "barrier.sync.aligned 1, 64",
        ] {
            refused(&format!("{odd}@%p1 bra $L1;\n{collective};\n$L1:"), collective, "@%p1 bra $L1");
        }
        refused(&format!("{odd}@%p1 bar.sync 0;"), "@%p1 bar.sync 0", "@%p1 bar.sync 0");
        refused(&format!("{odd}@%p1 ret;\n{EXCHANGE};"), EXCHANGE, "@%p1 ret");
        // These name only some lanes, or are for threads that need not be together.
        accepted(&format!(
            "{odd}@%p1 bra $L1;\nshfl.sync.bfly.b32 %r9, %r8, 2, 31, 0x55555555;\nbarrier.sync 1, 16;\n$L1:"
        ));
        // Nothing follows a trap.
        accepted(&format!("{odd}@%p1 bra $L1;\ntrap;\n$L1:\n{EXCHANGE};"));
    }

    #[test]
    fn loops_that_lanes_leave_one_by_one_part_them_within() {
        let wait = "{\n.reg .pred %done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 %done, [%r1], %r2;\nBODY@!%done bra again;\n}\n";
        let after = format!("{0}{0}{EXCHANGE};", wait.replace("BODY", ""));
        accepted(&after);
        refused(&wait.replace("BODY", "bar.sync 0;\n"), "bar.sync 0", "@!%done bra again");
        // Each lane has made another number of rounds.
        let counted = format!(
            "{}setp.eq.b32 %p1, %r5, 3;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:",
            wait.replace("BODY", "add.s32 %r5, %r5, 1;\n")
        );
        refused(&counted, "bar.sync 0", "@%p1 bra $L1");
        // All lanes leave this loop together.
        accepted("mov.b32 %r1, 0;\n$L1:\nbar.sync 0;\nadd.s32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 9;\n@%p1 bra $L1;");
    }

    #[test]
    fn what_is_the_same_in_all_lanes_parts_nobody() {
        let barrier_if =
            |condition: &str| format!("mov.u32 %r1, %tid.x;\n{condition}\n@%p1 bra $L1;\nbar.sync 0;\n$L1:");
        for uniform in [
            "setp.lt.u32 %p1, %r1, 128;",
            "setp.gt.u32 %p1, %r1, 31;",
            "shl.b32 %r2, %r1, 1;\nsetp.gt.u32 %p1, %r2, 63;",
            "shr.u32 %r2, %r1, 5;\nsetp.eq.b32 %p1, %r2, 3;",
            "and.b32 %r2, %r1, 127;\nadd.s32 %r2, %r2, 64;\nbfe.u32 %r2, %r2, 6, 2;\nsetp.eq.b32 %p1, %r2, 1;",
            "and.b32 %r2, %r1, 992;\nsetp.eq.b32 %p1, %r2, 32;",
            "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;\nsetp.eq.b32 %p1, %r2, 32;",
            "redux.sync.or.b32 %r2, %r1, -1;\nsetp.eq.b32 %p1, %r2, 32;",
            "{ .reg .pred %any; setp.ne.u32 %any, %r1, 0; vote.sync.any.pred %any, %any, -1; selp.u32 %r2, 1, 0, %any; }\nsetp.ne.b32 %p1, %r2, 0;",
            "ld.param.b64 %rd1, [f_param_0];\nld.global.b32 %r2, [%rd1];\nsetp.ne.b32 %p1, %r2, 0;",
            "mov.u32 %r2, %ctaid.x;\nsetp.ne.b32 %p1, %r2, 0;",
        ] {
            accepted(&barrier_if(uniform));
        }
        for divergent in [
            "setp.lt.u32 %p1, %r1, 100;",
            "setp.gt.u32 %p1, %r1, 32;",
            "setp.eq.b32 %p1, %r1, 0;",
            "shl.b32 %r2, %r1, 1;\nsetp.gt.u32 %p1, %r2, 31;",
            "shr.u32 %r2, %r1, 4;\nsetp.eq.b32 %p1, %r2, 3;",
            "and.b32 %r2, %r1, 48;\nsetp.eq.b32 %p1, %r2, 32;",
            "shfl.sync.idx.b32 %r2, %r1, %r1, 31, -1;\nsetp.eq.b32 %p1, %r2, 32;",
            "shfl.sync.idx.b32 %r2, %r1, 0, 7175, -1;\nsetp.eq.b32 %p1, %r2, 32;",
            "elect.sync _|%p1, -1;",
            "atom.global.add.u32 %r2, [%rd1], 1;\nsetp.eq.b32 %p1, %r2, 3;",
            "mul.wide.u32 %rd2, %r1, 4;\nld.global.b32 %r2, [%rd2];\nsetp.ne.b32 %p1, %r2, 0;",
            "mov.u32 %r2, %clock;\nsetp.ne.b32 %p1, %r2, 0;",
            "ld.local.b32 %r2, [%rd1];\nsetp.ne.b32 %p1, %r2, 0;",
            "setp.eq.b32 %p2, %r1, 0;\nmov.b32 %r2, 0;\n@%p2 mov.b32 %r2, 1;\nsetp.ne.b32 %p1, %r2, 0;",
            "call.uni (retval0), g, (param0);\nld.param.b32 %r2, [retval0];\nsetp.ne.b32 %p1, %r2, 0;",
        ] {
            refused(&barrier_if(divergent), "bar.sync 0", "@%p1 bra $L1");
        }
    }

    #[test]
    fn a_register_that_is_written_where_lanes_are_apart_is_not_uniform_behind() {
        let written = |before: &str, within: &str| {
            format!(
                "mov.u32 %r1, %laneid;\nsetp.eq.b32 %p1, %r1, 0;\n{before}\n@%p1 bra $L1;\n{within}\n$L1:\nsetp.eq.b32 %p2, %r2, 0;\n@%p2 bra $L2;\nbar.sync 0;\n$L2:"
            )
        };
        refused(&written("mov.b32 %r2, 0;", "mov.b32 %r2, 1;"), "bar.sync 0", "@%p2 bra $L2");
        // LLVM writes the same copy on both ways.
        accepted(&written("mov.b32 %r2, %r3;", "mov.b32 %r2, %r3;"));
        refused(&written("mov.b32 %r2, %r3;\nadd.s32 %r3, %r3, 1;", "mov.b32 %r2, %r3;"), "bar.sync 0", "@%p2 bra $L2");
        refused(&written("mov.b32 %r2, %r1;", "mov.b32 %r2, %r1;"), "bar.sync 0", "@%p2 bra $L2");
    }

    #[test]
    fn functions_that_are_called_have_nothing_for_all_lanes() {
        let ptx = ".visible .func (.param .b32 func_retval0) g(\n\t.param .b32 g_param_0\n)\n{\nbar.sync 0;\nret;\n}\n";
        let expected = Parted { function: "g".into(), instruction: (5, "bar.sync 0".into()), cause: None };
        assert_eq!(parted(ptx), [expected]);
        assert_eq!(parted(&ptx.replace("bar.sync 0;", "add.s32 %r1, %r1, 1;")), []);
        refused("$L1:\nbar.sync 0;\nbra.uni $L1;", "bar.sync 0", "");
    }
}
