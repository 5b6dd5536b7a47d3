//! From PTX text to statements: tokens, declarations, scopes and labels. This module knows the
//! grammar, and nothing of what an instruction means.
//!
//! Registers are resolved here, because PTX declares them before their use. Names of nested scopes,
//! as inline assembly has them, hide those outside. Labels are resolved by [`Entry::label`],
//! because a branch may come before its target.

use crate::fault::Error;
use std::collections::HashMap;

/// A token and where it starts.
#[derive(Clone, Copy)]
struct Token<'a> {
    kind: Kind<'a>,
    line: u32,
    start: usize,
}

/// What a token is.
#[derive(Clone, Copy, PartialEq)]
enum Kind<'a> {
    /// A directive, opcode, register or symbol: letters, digits, `_`, `$`, `%`, `.` and `::`.
    Word(&'a str),
    /// A word that starts with a digit.
    Number(&'a str),
    /// A string in quotation marks.
    Text,
    /// A punctuation character.
    Mark(u8),
    /// The end of the text.
    End,
}

/// In which of a warp's three files a register lies. Registers of 8 and 16 bits are 32-bit ones
/// with zeros above their value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Class {
    Pred,
    R32,
    R64,
}

/// A declared register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Reg {
    pub class: Class,
    /// The index in its file.
    pub index: u32,
    /// The width that was declared: 1, 8, 16, 32 or 64.
    pub bits: u8,
}

/// An operand as written. Floats hold their bits.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    Reg(Reg),
    Int(i64),
    F32(u32),
    /// A number `0d...`, or a decimal fraction.
    F64(u64),
    /// A symbol with a byte offset, a label, or a special register.
    Name(String, i64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `[a+16]`: the base, and an offset in bytes.
    Address(Box<Operand>, i64),
    /// `!a`
    Not(Box<Operand>),
    /// `a|b`
    Pair(Box<Operand>, Box<Operand>),
    /// `_`
    Sink,
}

/// An instruction as written.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub line: u32,
    /// The text, with one space in place of any white space.
    pub text: String,
    pub opcode: String,
    /// The guard's predicate, and whether it is negated.
    pub guard: Option<(u32, bool)>,
    pub operands: Vec<Operand>,
    scope: usize,
}

/// The state space of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VariableSpace {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// A piece of a variable's initial value.
#[derive(Clone, Debug)]
pub(crate) enum Init {
    Bytes(Vec<u8>),
    /// The address of a symbol plus an offset, in so many bytes.
    Address(String, i64, usize),
}

/// A declared variable or parameter.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    /// The line of the declaration.
    pub line: u32,
    pub name: String,
    pub space: VariableSpace,
    pub align: u64,
    /// Dynamic shared memory is an `extern` array without a size, and has `None`.
    pub bytes: Option<u64>,
    pub init: Vec<Init>,
}

/// The most bytes of an array, and the most registers of a file. Damaged text must not fill memory.
const MAX_ARRAY: i64 = 1 << 30;
const MAX_REGISTERS: i64 = 1 << 20;
/// The most bytes of parameters, in PTX ISA 8.1 and later.
const MAX_PARAM_BYTES: u64 = 32764;
/// The deepest nesting of braces in an operand or initial value. PTX uses two levels at most.
const MAX_DEPTH: usize = 8;

/// The statement behind each label, by the scope that declares it.
type Labels = HashMap<(usize, String), usize>;

/// An entry as written.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: String,
    /// The parameters in order, each with its offset in the parameter block.
    pub params: Vec<(Variable, u64)>,
    pub param_bytes: u64,
    /// The most threads of a block, from `.maxntid` or `.reqntid`.
    pub max_threads: Option<u32>,
    /// The block of `.reqntid`.
    pub required_block: Option<[u32; 3]>,
    /// The blocks of `.minnctapersm`; 1 without it.
    pub min_blocks: u32,
    /// How many registers of each class are declared: predicates, 32-bit, 64-bit.
    pub registers: [u32; 3],
    /// The `.shared` and `.local` variables of the body.
    pub variables: Vec<Variable>,
    pub statements: Vec<Statement>,
    labels: Labels,
    /// The lists of `.branchtargets`, by scope and name.
    branch_targets: HashMap<(usize, String), Vec<String>>,
    /// The scope around each scope.
    parents: Vec<usize>,
}

impl Entry {
    /// What the innermost scope has for which `find` finds something.
    fn in_scopes<T>(&self, mut scope: usize, find: impl Fn(usize) -> Option<T>) -> Option<T> {
        loop {
            if let Some(found) = find(scope) {
                return Some(found);
            }
            if scope == 0 {
                return None;
            }
            scope = self.parents[scope];
        }
    }

    /// The index of the statement behind a label, as a statement sees it.
    pub fn label(&self, from: &Statement, name: &str) -> Option<usize> {
        self.in_scopes(from.scope, |scope| self.labels.get(&(scope, name.to_string())).copied())
    }

    /// The labels of a `.branchtargets` list, as a statement sees it.
    pub fn targets(&self, from: &Statement, name: &str) -> Option<&[String]> {
        self.in_scopes(from.scope, |scope| self.branch_targets.get(&(scope, name.to_string())).map(Vec::as_slice))
    }
}

/// A module as written.
#[derive(Debug, Default)]
pub(crate) struct Unit {
    /// The PTX version: major and minor.
    pub version: [u32; 2],
    /// The name of the GPUs that the module is for, and the line where it stands.
    pub target: (String, u32),
    pub variables: Vec<Variable>,
    pub entries: Vec<Entry>,
}

/// How many bits a fundamental type such as `b32` has; a predicate has 1.
fn type_bits(name: &str) -> Option<u32> {
    Some(match name {
        "pred" => 1,
        "b8" | "u8" | "s8" => 8,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 16,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 32,
        "b64" | "u64" | "s64" | "f64" => 64,
        _ => return None,
    })
}

/// Parses the text of a module, whose name stands in errors.
pub(crate) fn parse(module: &str, text: &str) -> Result<Unit, Error> {
    let tokens = tokens(module, text)?;
    Parser { module, text, tokens, at: 0 }.unit()
}

/// Splits a text into tokens.
fn tokens<'a>(module: &str, text: &'a str) -> Result<Vec<Token<'a>>, Error> {
    let bytes = text.as_bytes();
    let is_word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.');
    let (mut out, mut at, mut line) = (Vec::new(), 0, 1);
    while at < bytes.len() {
        let (start, c) = (at, bytes[at]);
        let kind = match c {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            c if c.is_ascii_whitespace() || c == 0 => {
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                while at < bytes.len() && bytes[at] != b'\n' {
                    at += 1;
                }
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let end = text[at + 2..].find("*/").map_or(bytes.len(), |i| at + i + 4);
                line += text[at..end].matches('\n').count() as u32;
                at = end;
                continue;
            }
            b'"' => {
                let end = text[at + 1..].find('"').map(|i| at + 1 + i);
                at = end.ok_or_else(|| Error::at(module, line, "a string is not closed"))? + 1;
                Kind::Text
            }
            c if c.is_ascii_digit() => {
                while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'.') {
                    at += 1;
                    let hex = text[start..].starts_with("0x") || text[start..].starts_with("0X");
                    if !hex && matches!(bytes[at - 1], b'e' | b'E') && matches!(bytes.get(at), Some(b'+' | b'-')) {
                        at += 1;
                    }
                }
                Kind::Number(&text[start..at])
            }
            c if is_word(c) => {
                while at < bytes.len() {
                    if is_word(bytes[at]) {
                        at += 1;
                    } else if bytes[at] == b':'
                        && bytes.get(at + 1) == Some(&b':')
                        && bytes.get(at + 2).copied().is_some_and(is_word)
                    {
                        at += 2;
                    } else {
                        break;
                    }
                }
                Kind::Word(&text[start..at])
            }
            c if c.is_ascii_punctuation() => {
                at += 1;
                Kind::Mark(c)
            }
            _ => return Err(Error::at(module, line, format!("unexpected character {:?}", text[at..].chars().next()))),
        };
        out.push(Token { kind, line, start });
    }
    out.push(Token { kind: Kind::End, line, start: text.len() });
    Ok(out)
}

/// A number as PTX writes it: decimal, octal, hexadecimal, binary, `0f`, `0d` or a decimal
/// fraction.
fn number(text: &str) -> Option<Operand> {
    let lower = text.to_ascii_lowercase();
    if let Some(hex) = lower.strip_prefix("0f").filter(|h| h.len() == 8) {
        return u32::from_str_radix(hex, 16).ok().map(Operand::F32);
    }
    if let Some(hex) = lower.strip_prefix("0d").filter(|h| h.len() == 16) {
        return u64::from_str_radix(hex, 16).ok().map(Operand::F64);
    }
    let digits = lower.strip_suffix('u').unwrap_or(&lower);
    let int = |digits: &str, radix| u64::from_str_radix(digits, radix).ok().map(|v| Operand::Int(v as i64));
    if let Some(hex) = digits.strip_prefix("0x") {
        int(hex, 16)
    } else if let Some(binary) = digits.strip_prefix("0b") {
        int(binary, 2)
    } else if digits.contains(['.', 'e']) {
        digits.parse::<f64>().ok().map(|v| Operand::F64(v.to_bits()))
    } else if digits.len() > 1 && digits.starts_with('0') {
        int(&digits[1..], 8)
    } else {
        int(digits, 10)
    }
}

/// The registers that one scope declares.
#[derive(Default)]
struct Scope {
    id: usize,
    /// Single registers by name.
    names: HashMap<String, Reg>,
    /// Ranges such as `%r<9>` by their prefix, with the first register and how many there are.
    ranges: HashMap<String, (Reg, u32)>,
}

struct Parser<'a> {
    module: &'a str,
    text: &'a str,
    tokens: Vec<Token<'a>>,
    at: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Kind<'a> {
        self.tokens[self.at].kind
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    fn next(&mut self) -> Kind<'a> {
        let kind = self.peek();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        kind
    }

    fn fail<T>(&self, what: impl Into<String>) -> Result<T, Error> {
        Err(Error::at(self.module, self.line(), what))
    }

    fn describe(&self) -> String {
        let token = self.tokens[self.at];
        match token.kind {
            Kind::End => "the end of the text".into(),
            _ => {
                let rest = &self.text[token.start..];
                let next = self.tokens.get(self.at + 1).map_or(self.text.len(), |t| t.start) - token.start;
                format!("`{}`", rest[..next].trim())
            }
        }
    }

    fn accept(&mut self, mark: u8) -> bool {
        let found = self.peek() == Kind::Mark(mark);
        if found {
            self.next();
        }
        found
    }

    fn expect(&mut self, mark: u8) -> Result<(), Error> {
        if self.accept(mark) {
            return Ok(());
        }
        self.fail(format!("expected `{}`, found {}", mark as char, self.describe()))
    }

    fn word(&mut self) -> Result<&'a str, Error> {
        match self.peek() {
            Kind::Word(word) => {
                self.next();
                Ok(word)
            }
            _ => self.fail(format!("expected a name, found {}", self.describe())),
        }
    }

    fn int(&mut self) -> Result<i64, Error> {
        let negative = self.accept(b'-');
        if let Kind::Number(text) = self.peek()
            && let Some(Operand::Int(value)) = number(text)
        {
            self.next();
            return Ok(if negative { value.wrapping_neg() } else { value });
        }
        self.fail(format!("expected an integer, found {}", self.describe()))
    }

    /// An integer from `low` to `high`. In an error it is called `what`.
    fn bounded(&mut self, what: &str, low: i64, high: i64) -> Result<u64, Error> {
        let line = self.line();
        let value = self.int()?;
        if !(low..=high).contains(&value) {
            let what = format!("{what} is {value}: {low} to {high} is allowed");
            return Err(Error::at(self.module, line, what));
        }
        Ok(value as u64)
    }

    /// A power of two up to 64 KiB.
    fn alignment(&mut self) -> Result<u64, Error> {
        let line = self.line();
        let align = self.bounded("an alignment", 1, 1 << 16)?;
        if !align.is_power_of_two() {
            return Err(Error::at(self.module, line, format!("alignment {align} is not a power of two")));
        }
        Ok(align)
    }

    /// A version such as `8.3`.
    fn version(&mut self) -> Result<[u32; 2], Error> {
        if let Kind::Number(text) = self.peek()
            && let Some((major, minor)) = text.split_once('.')
            && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
        {
            self.next();
            return Ok([major, minor]);
        }
        self.fail(format!("expected a version such as 8.3, found {}", self.describe()))
    }

    /// Skips the rest of the line, for directives without a terminator.
    fn skip_line(&mut self) {
        let line = self.line();
        while self.line() == line && self.peek() != Kind::End {
            self.next();
        }
    }

    /// Skips a block `{ ... }`.
    fn skip_block(&mut self) -> Result<(), Error> {
        self.expect(b'{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.next() {
                Kind::Mark(b'{') => depth += 1,
                Kind::Mark(b'}') => depth -= 1,
                Kind::End => return self.fail("a `{` is not closed"),
                _ => {}
            }
        }
        Ok(())
    }

    fn unit(mut self) -> Result<Unit, Error> {
        let mut unit = Unit::default();
        loop {
            let word = match self.peek() {
                Kind::End if unit.target.0.is_empty() => return self.fail("the module has no .target"),
                Kind::End => return Ok(unit),
                Kind::Word(word) => word,
                _ => return self.fail(format!("expected a directive, found {}", self.describe())),
            };
            match word {
                ".version" => {
                    self.next();
                    unit.version = self.version()?;
                }
                ".target" => {
                    self.next();
                    let line = self.line();
                    unit.target = (self.word()?.to_string(), line);
                    while self.accept(b',') {
                        self.word()?;
                    }
                }
                ".address_size" => {
                    self.next();
                    self.bounded("the address size", 64, 64)?;
                }
                ".file" => self.skip_line(),
                ".visible" | ".extern" | ".weak" | ".common" => {
                    self.next();
                }
                ".entry" => {
                    self.next();
                    let entry = self.entry()?;
                    unit.entries.push(entry);
                }
                // Functions are skipped: only calls reach one, and a call is an error.
                ".func" => {
                    while !matches!(self.peek(), Kind::Mark(b'{' | b';') | Kind::End) {
                        self.next();
                    }
                    if !self.accept(b';') {
                        self.skip_block()?;
                    }
                }
                ".section" => {
                    self.next();
                    self.next();
                    self.skip_block()?;
                }
                ".pragma" => {
                    self.next();
                    self.next();
                    self.expect(b';')?;
                }
                ".global" | ".const" | ".shared" => unit.variables.extend(self.variables()?),
                _ => return self.fail(format!("unknown directive `{word}`")),
            }
        }
    }

    /// Variables of one declaration: `.space [.align n] .type name[n] = {...}, name ...;`
    fn variables(&mut self) -> Result<Vec<Variable>, Error> {
        let space = match self.word()? {
            ".global" => VariableSpace::Global,
            ".const" => VariableSpace::Const,
            ".shared" => VariableSpace::Shared,
            ".local" => VariableSpace::Local,
            other => return self.fail(format!("variables in `{other}` are not known")),
        };
        let (align, bits) = self.alignment_and_type()?;
        let mut out = Vec::new();
        loop {
            let mut variable = self.declarator(space, align, bits)?;
            if self.peek() == Kind::Mark(b'=') && !matches!(space, VariableSpace::Global | VariableSpace::Const) {
                let what = format!("`{}` has an initial value: only .global and .const may have one", variable.name);
                return self.fail(what);
            }
            if self.accept(b'=') {
                self.initialiser(bits as usize / 8, &mut variable.init, 0)?;
            }
            out.push(variable);
            if !self.accept(b',') {
                self.expect(b';')?;
                return Ok(out);
            }
        }
    }

    /// `[.align n] .type`: the alignment in bytes, and the size of an element in bits.
    fn alignment_and_type(&mut self) -> Result<(Option<u64>, u32), Error> {
        let mut align = None;
        loop {
            match self.word()? {
                ".align" => align = Some(self.alignment()?),
                word => match word.strip_prefix('.').and_then(type_bits) {
                    Some(bits) if bits >= 8 => return Ok((align, bits)),
                    _ => return self.fail(format!("unknown type `{word}`")),
                },
            }
        }
    }

    fn declarator(&mut self, space: VariableSpace, align: Option<u64>, bits: u32) -> Result<Variable, Error> {
        let (line, name) = (self.line(), self.word()?.to_string());
        let mut bytes = Some(bits as u64 / 8);
        while self.accept(b'[') {
            if self.accept(b']') {
                bytes = None;
            } else {
                let count = self.bounded("the size of an array", 0, MAX_ARRAY)?;
                bytes = bytes.and_then(|bytes| bytes.checked_mul(count)).filter(|bytes| *bytes <= MAX_ARRAY as u64);
                if bytes.is_none() {
                    return self.fail(format!("`{name}` is larger than {MAX_ARRAY} bytes"));
                }
                self.expect(b']')?;
            }
        }
        Ok(Variable { line, name, space, align: align.unwrap_or(bits as u64 / 8), bytes, init: Vec::new() })
    }

    fn initialiser(&mut self, element: usize, out: &mut Vec<Init>, depth: usize) -> Result<(), Error> {
        if depth < MAX_DEPTH && self.accept(b'{') {
            while !self.accept(b'}') {
                self.initialiser(element, out, depth + 1)?;
                if self.peek() != Kind::Mark(b'}') {
                    self.expect(b',')?;
                }
            }
            return Ok(());
        }
        if let Kind::Word(mut name) = self.peek() {
            self.next();
            let generic = name == "generic" && self.accept(b'(');
            if generic {
                name = self.word()?;
                self.expect(b')')?;
            }
            let offset = if self.accept(b'+') { self.int()? } else { 0 };
            out.push(Init::Address(name.to_string(), offset, element));
            return Ok(());
        }
        let negative = self.accept(b'-');
        let Kind::Number(text) = self.peek() else {
            return self.fail(format!("expected an initial value, found {}", self.describe()));
        };
        let bits = match number(text) {
            Some(Operand::Int(value)) => (if negative { value.wrapping_neg() } else { value }) as u64,
            Some(Operand::F32(bits)) if !negative => bits as u64,
            Some(Operand::F64(bits)) if !negative && element == 4 => (f64::from_bits(bits) as f32).to_bits() as u64,
            Some(Operand::F64(bits)) if !negative => bits,
            _ => return self.fail(format!("`{text}` is not an initial value")),
        };
        self.next();
        out.push(Init::Bytes(bits.to_le_bytes()[..element].to_vec()));
        Ok(())
    }

    fn entry(&mut self) -> Result<Entry, Error> {
        let mut entry = Entry {
            name: self.word()?.to_string(),
            params: Vec::new(),
            param_bytes: 0,
            max_threads: None,
            required_block: None,
            min_blocks: 1,
            registers: [0; 3],
            variables: Vec::new(),
            statements: Vec::new(),
            labels: HashMap::new(),
            branch_targets: HashMap::new(),
            parents: vec![0],
        };
        if self.accept(b'(') {
            while !self.accept(b')') {
                self.param(&mut entry)?;
                if self.peek() != Kind::Mark(b')') {
                    self.expect(b',')?;
                }
            }
        }
        while !matches!(self.peek(), Kind::Mark(b'{')) {
            match self.word()? {
                ".maxntid" => entry.max_threads = Some(self.extent()?.iter().product()),
                ".reqntid" => {
                    let block = self.extent()?;
                    (entry.required_block, entry.max_threads) = (Some(block), Some(block.iter().product()));
                }
                ".minnctapersm" => entry.min_blocks = self.int()?.clamp(1, 32) as u32,
                ".maxnreg" | ".maxnctapersm" => {
                    self.int()?;
                }
                ".noreturn" => {}
                ".pragma" => {
                    self.next();
                    self.expect(b';')?;
                }
                other => return self.fail(format!("unknown directive `{other}` before the body of an entry")),
            }
        }
        self.body(&mut entry)?;
        Ok(entry)
    }

    /// Threads in x, y and z. Their product is at most 1024.
    fn extent(&mut self) -> Result<[u32; 3], Error> {
        let mut extent = [self.bounded("a block size", 1, 1024)? as u32, 1, 1];
        for size in &mut extent[1..] {
            if self.accept(b',') {
                *size = self.bounded("a block size", 1, 1024)? as u32;
            }
        }
        if extent.iter().product::<u32>() > 1024 {
            return self.fail(format!("a block of {extent:?} threads has more than 1024"));
        }
        Ok(extent)
    }

    fn param(&mut self, entry: &mut Entry) -> Result<(), Error> {
        match self.word()? {
            ".param" => {}
            other => return self.fail(format!("expected `.param`, found `{other}`")),
        }
        let (mut align, mut bits) = (None, None);
        while let Kind::Word(word) = self.peek() {
            match word {
                ".align" => {
                    self.next();
                    align = Some(self.alignment()?);
                }
                ".ptr" | ".global" | ".shared" | ".const" | ".local" => {
                    self.next();
                    // The alignment behind `.ptr` is that of what the pointer points to.
                    if self.peek() == Kind::Word(".align") {
                        self.next();
                        self.int()?;
                    }
                }
                word => match word.strip_prefix('.').and_then(type_bits) {
                    Some(found) => {
                        self.next();
                        bits = Some(found);
                    }
                    None => break,
                },
            }
        }
        let Some(bits) = bits else { return self.fail("a parameter has no type") };
        let variable = self.declarator(VariableSpace::Param, align, bits)?;
        let Some(bytes) = variable.bytes else { return self.fail("a parameter has no size") };
        let offset = entry.param_bytes.next_multiple_of(variable.align.max(1));
        entry.param_bytes = offset + bytes;
        if entry.param_bytes > MAX_PARAM_BYTES {
            return self.fail(format!("{} bytes of parameters; {MAX_PARAM_BYTES} are allowed", entry.param_bytes));
        }
        entry.params.push((variable, offset));
        Ok(())
    }

    fn body(&mut self, entry: &mut Entry) -> Result<(), Error> {
        self.expect(b'{')?;
        let mut scopes = vec![Scope::default()];
        while !scopes.is_empty() {
            let scope = scopes.last().map_or(0, |scope| scope.id);
            match self.peek() {
                Kind::Mark(b'{') => {
                    self.next();
                    entry.parents.push(scope);
                    scopes.push(Scope { id: entry.parents.len() - 1, ..Scope::default() });
                }
                Kind::Mark(b'}') => {
                    self.next();
                    scopes.pop();
                }
                Kind::Mark(b';') => {
                    self.next();
                }
                Kind::Mark(b'@') => self.statement(entry, &scopes)?,
                Kind::Word(".reg") => self.registers(entry, &mut scopes)?,
                Kind::Word(".local" | ".shared") => {
                    let variables = self.variables()?;
                    entry.variables.extend(variables);
                }
                Kind::Word(".pragma") => {
                    self.next();
                    self.next();
                    self.expect(b';')?;
                }
                Kind::Word(".loc" | ".file") => self.skip_line(),
                Kind::Word(word) if self.tokens[self.at + 1].kind == Kind::Mark(b':') => {
                    self.next();
                    self.next();
                    if self.peek() == Kind::Word(".branchtargets") {
                        self.next();
                        let mut targets = vec![self.word()?.to_string()];
                        while self.accept(b',') {
                            targets.push(self.word()?.to_string());
                        }
                        self.expect(b';')?;
                        entry.branch_targets.insert((scope, word.to_string()), targets);
                    } else if entry.labels.insert((scope, word.to_string()), entry.statements.len()).is_some() {
                        return self.fail(format!("label `{word}` is declared twice in one scope"));
                    }
                }
                Kind::Word(word) if word.starts_with('.') => {
                    return self.fail(format!("unknown directive `{word}` in a body"));
                }
                Kind::Word(_) => self.statement(entry, &scopes)?,
                _ => return self.fail(format!("expected a statement, found {}", self.describe())),
            }
        }
        Ok(())
    }

    fn registers(&mut self, entry: &mut Entry, scopes: &mut [Scope]) -> Result<(), Error> {
        self.next();
        let word = self.word()?;
        let Some(bits) = word.strip_prefix('.').and_then(type_bits) else {
            return self.fail(format!("unknown register type `{word}`"));
        };
        let class = match bits {
            1 => Class::Pred,
            64 => Class::R64,
            _ => Class::R32,
        };
        let scope = scopes.last_mut().expect("a body has a scope");
        loop {
            let name = self.word()?.to_string();
            let file = &mut entry.registers[class as usize];
            let first = Reg { class, index: *file, bits: bits as u8 };
            if self.accept(b'<') {
                let count = self.bounded("a number of registers", 0, MAX_REGISTERS)? as u32;
                self.expect(b'>')?;
                entry.registers[class as usize] += count;
                if entry.registers[class as usize] as i64 > MAX_REGISTERS {
                    return self.fail(format!("more than {MAX_REGISTERS} registers"));
                }
                scope.ranges.insert(name, (first, count));
            } else {
                *file += 1;
                scope.names.insert(name, first);
            }
            if !self.accept(b',') {
                return self.expect(b';');
            }
        }
    }

    fn find_register(name: &str, scopes: &[Scope]) -> Option<Reg> {
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        scopes.iter().rev().find_map(|scope| {
            if let Some(reg) = scope.names.get(name) {
                return Some(*reg);
            }
            // `%r12` may be number 12 of `%r<99>`. It may be number 2 of `%r1<9>` too, as a prefix
            // may end in digits. So every split is tried.
            (name.len() - digits..name.len()).find_map(|split| {
                let (first, count) = scope.ranges.get(&name[..split])?;
                let number: u32 = name[split..].parse().ok()?;
                (number < *count).then_some(Reg { index: first.index + number, ..*first })
            })
        })
    }

    fn statement(&mut self, entry: &mut Entry, scopes: &[Scope]) -> Result<(), Error> {
        let (line, start) = (self.line(), self.tokens[self.at].start);
        let mut guard = None;
        if self.accept(b'@') {
            let negated = self.accept(b'!');
            let name = self.word()?;
            match Self::find_register(name, scopes) {
                Some(Reg { class: Class::Pred, index, .. }) => guard = Some((index, negated)),
                _ => return self.fail(format!("guard `{name}` is not a declared predicate")),
            }
        }
        let opcode = self.word()?.to_string();
        let mut operands = Vec::new();
        while !self.accept(b';') {
            operands.push(self.operand(scopes, 0)?);
            if self.peek() != Kind::Mark(b';') {
                self.expect(b',')?;
            }
        }
        let end = self.tokens[self.at].start;
        let text = self.text[start..end].split(';').next().unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let scope = scopes.last().map_or(0, |scope| scope.id);
        entry.statements.push(Statement { line, text, opcode, guard, operands, scope });
        Ok(())
    }

    fn operand(&mut self, scopes: &[Scope], depth: usize) -> Result<Operand, Error> {
        if depth > MAX_DEPTH {
            return self.fail("an operand is nested too deeply");
        }
        let operand = match self.peek() {
            // The lists of a call stand in parentheses.
            Kind::Mark(open @ (b'{' | b'(')) => {
                self.next();
                let close = if open == b'{' { b'}' } else { b')' };
                let mut elements = Vec::new();
                while !self.accept(close) {
                    elements.push(self.operand(scopes, depth + 1)?);
                    if self.peek() != Kind::Mark(close) {
                        self.expect(b',')?;
                    }
                }
                Operand::Vector(elements)
            }
            Kind::Mark(b'[') => {
                self.next();
                let base = self.operand(scopes, depth + 1)?;
                let signed = self.accept(b'+') || self.peek() == Kind::Mark(b'-');
                let offset = if signed { self.int()? } else { 0 };
                self.expect(b']')?;
                match base {
                    Operand::Name(name, inner) => {
                        Operand::Address(Box::new(Operand::Name(name, 0)), inner.wrapping_add(offset))
                    }
                    base => Operand::Address(Box::new(base), offset),
                }
            }
            Kind::Mark(b'!') => {
                self.next();
                Operand::Not(Box::new(self.operand(scopes, depth + 1)?))
            }
            Kind::Mark(b'-') => {
                self.next();
                match self.operand(scopes, depth + 1)? {
                    Operand::Int(value) => Operand::Int(value.wrapping_neg()),
                    Operand::F64(bits) => Operand::F64((-f64::from_bits(bits)).to_bits()),
                    _ => return self.fail("`-` stands before something that is not a number"),
                }
            }
            Kind::Number(text) => {
                let Some(value) = number(text) else { return self.fail(format!("`{text}` is not a number")) };
                self.next();
                value
            }
            Kind::Word("_") => {
                self.next();
                Operand::Sink
            }
            Kind::Word(name) => {
                self.next();
                match Self::find_register(name, scopes) {
                    Some(reg) => Operand::Reg(reg),
                    None => {
                        let mut offset = 0;
                        let next_number = matches!(self.tokens.get(self.at + 1).map(|t| t.kind), Some(Kind::Number(_)));
                        if self.peek() == Kind::Mark(b'+') && next_number {
                            self.next();
                            offset = self.int()?;
                        }
                        Operand::Name(name.to_string(), offset)
                    }
                }
            }
            _ => return self.fail(format!("expected an operand, found {}", self.describe())),
        };
        if self.accept(b'|') {
            let second = self.operand(scopes, depth + 1)?;
            return Ok(Operand::Pair(Box::new(operand), Box::new(second)));
        }
        Ok(operand)
    }
}
