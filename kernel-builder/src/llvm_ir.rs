//! The finishing step: it says on the LLVM IR what rustc cannot say, before LLVM optimises it.
//!
//! 1. Every inline `asm!` becomes **convergent**. rustc emits the calls without that attribute, and
//!    LLVM may then duplicate a `bar.sync` into both sides of a branch. Two barriers where the
//!    source has one are a hang or a race on a GPU. LLVM optimises no crate before this step, and
//!    what comes out behind it is looked at ([`crate::convergence`]). The literals of a template
//!    stay as they are, because they are arithmetic: convergent ones could not be merged, hoisted
//!    or selected, and ptxas then serialises the products of attention.
//! 2. Every entry gets its **launch bounds** (`nvvm.maxntid`, `nvvm.minctasm`). Without them ptxas
//!    silently drops `setmaxnreg`. They come from the launch tables that the macros write: a global
//!    `framestride_launch_<entry>` holds a JSON object.
//! 3. The launch tables **leave the module**, and so does the text of the spec (`framestride_spec`,
//!    which `attention_kernels!` writes). The manifest carries them on.
//!
//! The step counts what it changes. Anything that it does not expect is a [`FinishError`], since
//! silence here would be wrong code on a GPU.

use std::collections::BTreeMap;

use framestride_shapes::arch::Arch;
use framestride_shapes::numbers::PREFIX;
use serde::{Deserialize, Serialize};

/// The prefix of the globals that hold launch tables.
pub const TABLE_PREFIX: &str = "framestride_launch_";
/// The global that holds the spec's TOML text, when the crate has attention kernels.
pub const SPEC_GLOBAL: &str = "framestride_spec";

/// How an entry is launched, as its macro wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchTable {
    /// Name of the entry.
    pub entry: String,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks that must fit on one multiprocessor together.
    pub min_blocks: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The parameters, in order.
    pub params: Vec<TableParam>,
}

/// A parameter as its macro knows it. The PTX tells its place and size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableParam {
    /// Name in the source.
    pub name: String,
    /// Rust type.
    #[serde(rename = "type")]
    pub ty: String,
}

/// Finished IR, and what was changed in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// The IR.
    pub ir: String,
    /// The launch tables, in the order of the module's entries.
    pub tables: Vec<LaunchTable>,
    /// The spec's TOML text. A crate without attention kernels has none.
    pub spec: Option<String>,
    /// Number of calls of inline assembly that became convergent.
    pub made_convergent: usize,
    /// Number of calls of inline assembly that already were convergent.
    pub already_convergent: usize,
    /// Number of calls of inline assembly that are literals of a template.
    pub literals: usize,
}

/// The IR is not what the finishing step expects, and nothing was built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FinishError {
    /// A kernel entry has no launch table.
    #[error(
        "kernel `{entry}` has no launch table `{TABLE_PREFIX}{entry}`: declare it with `attention_kernels!` or `#[kernel]`"
    )]
    EntryWithoutTable {
        /// The entry.
        entry: String,
    },
    /// A launch table belongs to no kernel entry.
    #[error("launch table `{TABLE_PREFIX}{entry}` belongs to no kernel entry of that name")]
    TableWithoutEntry {
        /// The entry it names.
        entry: String,
    },
    /// The module has no kernel.
    #[error("the device crate has no kernel entry: use `attention_kernels!` or `#[kernel]` in its lib.rs")]
    NoEntry,
    /// A launch table cannot be read, or says something impossible.
    #[error("launch table `{TABLE_PREFIX}{entry}`: {problem}")]
    BadTable {
        /// The entry it names.
        entry: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The spec's text cannot be read.
    #[error("the global `{SPEC_GLOBAL}` is not the UTF-8 text of a spec: leave this name to `attention_kernels!`")]
    BadSpec,
    /// The step does not know this IR.
    #[error("line {line} of the LLVM IR is not what the finishing step knows: {problem}\n    {text}")]
    Unknown {
        /// Number of the line, from 1.
        line: usize,
        /// What is surprising.
        problem: &'static str,
        /// The line, shortened.
        text: String,
    },
}

/// Finishes the IR of a device crate that is built for `arch`.
///
/// # Errors
/// [`FinishError`] for an entry without table, a table without entry, a table that says something
/// impossible, and IR that is not understood.
pub fn finish(ir: &str, arch: Arch) -> Result<Finished, FinishError> {
    let tables = read_tables(ir, arch)?;
    let groups = attribute_groups(ir);
    let mut next_group = groups.keys().max().map_or(0, |last| last + 1);
    let mut finished = Finished {
        ir: String::new(),
        tables: Vec::new(),
        spec: read_spec(ir)?,
        made_convergent: 0,
        already_convergent: 0,
        literals: 0,
    };
    let mut out = String::with_capacity(ir.len() + 4096);
    let mut new_groups = Vec::new();
    for (index, line) in ir.lines().enumerate() {
        let unknown =
            |problem| FinishError::Unknown { line: index + 1, problem, text: line.chars().take(160).collect() };
        if table_name(line).is_some() || is_spec(line) {
            continue;
        }
        if line.starts_with("@llvm.used =") || line.starts_with("@llvm.compiler.used =") {
            let rest = without_tables(line).ok_or_else(|| unknown("a list of used globals of another form"))?;
            if rest.is_empty() {
                continue;
            }
            out.push_str(&rest);
        } else if is_asm(line) {
            let end = asm_call_end(line).ok_or_else(|| unknown("inline assembly that is no plain call"))?;
            let attributes = &line[end..];
            let group = attributes.split('#').nth(1).and_then(leading_number).and_then(|number| groups.get(&number));
            if is_literal(line) {
                finished.literals += 1;
                out.push_str(line);
            } else if line.contains(PREFIX) {
                return Err(unknown("a literal of a template in another instruction than `mov.u32`"));
            } else if has_word(attributes, "convergent") || group.is_some_and(|group| has_word(group, "convergent")) {
                finished.already_convergent += 1;
                out.push_str(line);
            } else {
                finished.made_convergent += 1;
                out.push_str(&line[..end]);
                out.push_str(" convergent");
                out.push_str(attributes);
            }
        } else if line.starts_with("define ") && has_word(line.split('(').next().unwrap_or(""), "ptx_kernel") {
            let (name, end) = function_head(line).ok_or_else(|| unknown("a kernel entry of another form"))?;
            let table = tables.get(name).ok_or_else(|| FinishError::EntryWithoutTable { entry: name.to_string() })?;
            let (head, tail) = line.split_at(end);
            let old = tail.find('#').and_then(|at| Some((at, leading_number(&tail[at + 1..])?)));
            let inherited = match old {
                Some((_, number)) => {
                    groups.get(&number).ok_or_else(|| unknown("an attribute group that is missing"))?
                }
                None => "",
            };
            if inherited.contains("nvvm.") {
                return Err(unknown("a kernel entry that already has launch bounds"));
            }
            // Each entry gets a group of its own: entries share theirs, and their bounds differ.
            let tail = match old {
                Some((at, number)) => tail.replacen(&tail[at..=at + digits(number)], &format!("#{next_group}"), 1),
                None => tail.replacen('{', &format!("#{next_group} {{"), 1),
            };
            new_groups.push(format!(
                "attributes #{next_group} = {{ {inherited} \"nvvm.maxntid\"=\"{},1,1\" \"nvvm.minctasm\"=\"{}\" }}",
                table.threads, table.min_blocks
            ));
            next_group += 1;
            finished.tables.push(table.clone());
            out.push_str(head);
            out.push_str(&tail);
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    if finished.tables.is_empty() {
        return Err(FinishError::NoEntry);
    }
    if let Some(entry) = tables.keys().find(|name| !finished.tables.iter().any(|table| table.entry == **name)) {
        return Err(FinishError::TableWithoutEntry { entry: entry.to_string() });
    }
    for group in new_groups {
        out.push_str(&group);
        out.push('\n');
    }
    if let Some(at) = out.find(TABLE_PREFIX).or_else(|| out.find(&format!("@{SPEC_GLOBAL}"))) {
        let line = out[..at].lines().count().max(1);
        let text = out.lines().nth(line - 1).unwrap_or("").chars().take(160).collect();
        return Err(FinishError::Unknown { line, problem: "code that reads a launch table or the spec", text });
    }
    finished.ir = out;
    Ok(finished)
}

/// Reads and checks the launch tables of a module, by entry.
fn read_tables(ir: &str, arch: Arch) -> Result<BTreeMap<&str, LaunchTable>, FinishError> {
    let mut tables = BTreeMap::new();
    for line in ir.lines() {
        let Some(entry) = table_name(line) else { continue };
        let bad = |problem: String| FinishError::BadTable { entry: entry.to_string(), problem };
        let bytes = string_constant(line).ok_or_else(|| bad("is not an array of bytes".into()))?;
        let table: LaunchTable =
            serde_json::from_slice(&bytes).map_err(|error| bad(format!("is not the JSON expected: {error}")))?;
        if table.entry != entry {
            return Err(bad(format!("names the entry `{}`", table.entry)));
        }
        for (key, value, limit) in
            [("threads", table.threads, arch.block_threads), ("min_blocks", table.min_blocks, arch.blocks)]
        {
            if value == 0 || value > limit {
                return Err(bad(format!("`{key}` is {value}, but must lie in 1..={limit}")));
            }
        }
        let most = arch.block_shared_bytes;
        if table.shared_bytes > most {
            return Err(bad(format!("`shared_bytes` is {}, but a block has at most {most}", table.shared_bytes)));
        }
        tables.insert(entry, table);
    }
    Ok(tables)
}

/// Reads the text of the spec, when the module has one.
fn read_spec(ir: &str) -> Result<Option<String>, FinishError> {
    let Some(line) = ir.lines().find(|line| is_spec(line)) else { return Ok(None) };
    let text = string_constant(line).and_then(|bytes| String::from_utf8(bytes).ok());
    text.map(Some).ok_or(FinishError::BadSpec)
}

/// Whether this line defines the spec's text.
fn is_spec(line: &str) -> bool {
    line.strip_prefix('@').and_then(|rest| rest.strip_prefix(SPEC_GLOBAL)).is_some_and(|rest| rest.starts_with(" = "))
}

/// The entry whose launch table this line defines.
fn table_name(line: &str) -> Option<&str> {
    line.strip_prefix('@')?.strip_prefix(TABLE_PREFIX)?.split_once(" = ").map(|(name, _)| name)
}

/// The bytes of the first `c"..."` of a line. Printable ASCII but `"` and `\` stands for itself,
/// and the rest is `\XX`.
fn string_constant(line: &str) -> Option<Vec<u8>> {
    let text = line.split_once("c\"")?.1.split('"').next()?;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'\\' {
            bytes.push(*first);
        } else if let [b'\\', tail @ ..] = rest {
            bytes.push(b'\\');
            rest = tail;
        } else {
            bytes.push(u8::from_str_radix(std::str::from_utf8(rest.get(..2)?).ok()?, 16).ok()?);
            rest = &rest[2..];
        }
    }
    Some(bytes)
}

/// The line of `@llvm.used` without the launch tables. It is empty when nothing remains.
fn without_tables(line: &str) -> Option<String> {
    let (head, rest) = line.split_once("[")?;
    let (_, rest) = rest.split_once("] [")?;
    let (names, tail) = rest.split_once(']')?;
    let ours = |name: &str| {
        let name = name.split_once('@').map_or("", |(_, name)| name);
        name.starts_with(TABLE_PREFIX) || name == SPEC_GLOBAL
    };
    let kept: Vec<&str> = names.split(", ").filter(|name| !ours(name)).collect();
    if kept.is_empty() {
        return Some(String::new());
    }
    Some(format!("{head}[{} x ptr] [{}]{tail}", kept.len(), kept.join(", ")))
}

/// Attribute groups by number.
fn attribute_groups(ir: &str) -> BTreeMap<u32, &str> {
    let lines = ir.lines().filter_map(|line| line.strip_prefix("attributes #")?.split_once(" = { "));
    lines.filter_map(|(number, rest)| Some((number.parse().ok()?, rest.strip_suffix(" }")?))).collect()
}

/// Whether the line is an instruction with inline assembly. In a function body, strings stand only
/// in its two texts, so the word comes before the first quote. `module asm` stands outside of
/// functions.
fn is_asm(line: &str) -> bool {
    line.starts_with(' ') && has_word(line.split('"').next().unwrap_or(""), "asm")
}

/// Whether the instruction with inline assembly only sets a register to a literal of a template.
fn is_literal(line: &str) -> bool {
    let mut texts = line.split('"').skip(1).step_by(2);
    let name = texts.next().and_then(|text| text.strip_prefix("mov.u32 ${0}, ")?.strip_suffix(';'));
    let is_part = |byte: u8| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_name = |name: &str| name.strip_prefix(PREFIX).is_some_and(|rest| rest.bytes().all(is_part));
    name.is_some_and(is_name) && matches!(texts.next(), Some("=r" | "=&r"))
}

fn has_word(text: &str, word: &str) -> bool {
    text.split([' ', ',']).any(|found| found == word)
}

fn leading_number(text: &str) -> Option<u32> {
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn digits(number: u32) -> usize {
    number.to_string().len()
}

/// The byte offset behind the arguments of `[%x =] [tail] call ... asm [flags] "text",
/// "constraints"(arguments)`.
fn asm_call_end(line: &str) -> Option<usize> {
    let before_quote = line.split('"').next()?;
    let mut words = before_quote.split_whitespace().peekable();
    if words.peek().is_some_and(|word| word.starts_with('%')) {
        words.next();
        words.next().filter(|word| *word == "=")?;
    }
    words.next_if(|word| *word == "tail");
    words.next().filter(|word| *word == "call")?;
    let mut quotes = line.match_indices('"').map(|(at, _)| at);
    let end_of_constraints = quotes.nth(3)?;
    closing_parenthesis(line, end_of_constraints + 1)
}

/// The name of the function that a `define` line is about, and the byte offset behind its
/// parameters.
fn function_head(line: &str) -> Option<(&str, usize)> {
    let at = line.find(" @")? + 2;
    let open = at + line[at..].find('(')?;
    Some((line[at..open].trim_matches('"'), closing_parenthesis(line, open)?))
}

/// The byte offset behind the `)` that closes the `(` at `open`.
fn closing_parenthesis(line: &str, open: usize) -> Option<usize> {
    let mut depth = 0;
    let mut quoted = false;
    for (at, byte) in line.bytes().enumerate().skip(open) {
        match byte {
            b'"' => quoted = !quoted,
            b'(' if !quoted => depth += 1,
            b')' if !quoted => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(ir: &str) -> Result<Finished, FinishError> {
        super::finish(ir, Arch::SM_90A)
    }

    const TABLE: &str = r#"@framestride_launch_a = constant [9 x i8] c"{\22entry\22:\22a\22,\22threads\22:384,\22min_blocks\22:1,\22shared_bytes\22:1024,\22params\22:[]}", align 1
"#;
    const ENTRY: &str = "define ptx_kernel void @a(ptr byval([16 x i8]) align 8 %p) unnamed_addr #1 {
  ret void
}
attributes #1 = { convergent nounwind \"target-cpu\"=\"sm_90a\" }
";

    fn table(entry: &str, threads: u32) -> String {
        TABLE
            .replace("_a ", &format!("_{entry} "))
            .replace("\\22a\\22", &format!("\\22{entry}\\22"))
            .replace("384", &threads.to_string())
    }

    #[test]
    fn every_asm_call_becomes_convergent_once() {
        let body = r#"define internal void @f() #2 {
  call void asm sideeffect alignstack "bar.sync 0; // (", "~{memory}"(), !srcloc !2
  %x = tail call { i32, i32 } asm "mov.u32 $0, $1;", "=r,r"(i32 ptrtoint (ptr @g to i32)) #3, !srcloc !4
  %y = call i32 asm "activemask.b32 $0;", "=r"() #4
  %z = call i32 @asm(i32 0)
}
module asm ".extern .shared .align 1024 .b8 dyn_smem[];"
attributes #3 = { nounwind }
attributes #4 = { convergent nounwind }
"#;
        let finished = finish(&format!("{TABLE}{ENTRY}{body}")).unwrap();
        assert_eq!((finished.made_convergent, finished.already_convergent), (2, 1));
        assert!(finished.ir.contains(r#""bar.sync 0; // (", "~{memory}"() convergent, !srcloc !2"#));
        assert!(finished.ir.contains("(i32 ptrtoint (ptr @g to i32)) convergent #3, !srcloc !4"));
        assert!(finished.ir.contains(r#""=r"() #4"#));
        assert!(finished.ir.contains("module asm \".extern .shared .align 1024 .b8 dyn_smem[];\"\n"));
        // The step recognises what it has made, and changes nothing twice.
        let tables_back =
            format!("{TABLE}{}", finished.ir.replace(" \"nvvm.maxntid\"=\"384,1,1\" \"nvvm.minctasm\"=\"1\"", ""));
        assert_eq!(finish(&tables_back).unwrap().made_convergent, 0);
    }

    #[test]
    fn literals_of_a_template_stay_arithmetic() {
        let literal = "  %x = tail call i32 asm \"mov.u32 ${0}, FS_e4m3_image_rows;\", \"=r\"() #4, !srcloc !2\n";
        let ir = format!("{TABLE}{ENTRY}define internal void @f() #2 {{\n{literal}}}\n");
        let finished = finish(&ir).unwrap();
        assert_eq!((finished.literals, finished.made_convergent), (1, 0));
        assert!(finished.ir.contains(literal));
        // A literal in an instruction that does more might have to stay where it is.
        for (from, to) in [("mov.u32", "add.u32"), ("\"=r\"()", "\"=r,~{memory}\"()"), ("rows;", "rows; bar.sync 0;")] {
            let error = finish(&ir.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains("another instruction than `mov.u32`"), "{error}");
        }
    }

    #[test]
    fn entries_that_share_attributes_get_their_own_bounds() {
        let second = "define ptx_kernel void @b() unnamed_addr #1 {\n  ret void\n}\n";
        let used = "@llvm.used = appending global [3 x ptr] [ptr @framestride_launch_a, ptr @keep, ptr @framestride_launch_b], section \"llvm.metadata\"\n";
        let ir = format!("{TABLE}{}{used}{ENTRY}{second}", table("b", 128));
        let finished = finish(&ir).unwrap();
        assert!(finished.ir.contains("@a(ptr byval([16 x i8]) align 8 %p) unnamed_addr #2 {"), "{}", finished.ir);
        assert!(finished.ir.contains("@b() unnamed_addr #3 {"));
        assert!(finished.ir.contains(
            "attributes #2 = { convergent nounwind \"target-cpu\"=\"sm_90a\" \"nvvm.maxntid\"=\"384,1,1\" \"nvvm.minctasm\"=\"1\" }"
        ));
        assert!(finished.ir.contains("\"nvvm.maxntid\"=\"128,1,1\""));
        assert!(finished.ir.contains("@llvm.used = appending global [1 x ptr] [ptr @keep], section"));
        assert!(!finished.ir.contains(TABLE_PREFIX));
        assert_eq!(
            finished.tables.iter().map(|t| (t.entry.as_str(), t.threads)).collect::<Vec<_>>(),
            [("a", 384), ("b", 128)]
        );
    }

    #[test]
    fn the_spec_is_taken_out() {
        let spec = "@framestride_spec = constant [9 x i8] c\"# \\C3\\A9\\0Aa\\\\b\", align 1\n@llvm.used = appending global [2 x ptr] [ptr @framestride_launch_a, ptr @framestride_spec], section \"llvm.metadata\"\n";
        let finished = finish(&format!("{TABLE}{spec}{ENTRY}")).unwrap();
        assert_eq!(finished.spec.as_deref(), Some("# é\na\\b"));
        assert!(!finished.ir.contains("@framestride_") && !finished.ir.contains("@llvm.used"), "{}", finished.ir);
        let not_text = finish(&format!("{TABLE}{}{ENTRY}", spec.replace("\\C3", "\\FF"))).unwrap_err();
        assert_eq!(not_text, FinishError::BadSpec);
    }

    #[test]
    fn an_entry_without_attributes_gets_a_group() {
        let ir = format!("{TABLE}define ptx_kernel void @a() {{\n  ret void\n}}\n");
        assert!(finish(&ir).unwrap().ir.contains("define ptx_kernel void @a() #0 {"));
    }

    #[test]
    fn surprises_are_errors() {
        let without_table = finish(ENTRY).unwrap_err();
        assert_eq!(without_table, FinishError::EntryWithoutTable { entry: "a".into() });
        let without_entry = finish(&format!("{TABLE}{}{ENTRY}", table("b", 32))).unwrap_err();
        assert_eq!(without_entry, FinishError::TableWithoutEntry { entry: "b".into() });
        assert_eq!(finish("define void @f() {\n}\n").unwrap_err(), FinishError::NoEntry);
        for (ir, expected) in [
            (
                format!("{TABLE}{ENTRY}  invoke void asm \"bar.sync 0;\", \"\"() to label %a unwind label %b\n"),
                "no plain call",
            ),
            (format!("{TABLE}{ENTRY}  %x = load i8, ptr @framestride_launch_a\n"), "reads a launch table or the spec"),
            (
                format!("{TABLE}{}", ENTRY.replace("nounwind", "\"nvvm.maxntid\"=\"1,1,1\"")),
                "already has launch bounds",
            ),
            (format!("{TABLE}{}", ENTRY.replace("attributes #1", "attributes #7")), "attribute group that is missing"),
            (format!("{}{ENTRY}", table("a", 1025)), "`threads` is 1025, but must lie in 1..=1024"),
            (
                format!("{}{ENTRY}", TABLE.replace("1024", "232449")),
                "`shared_bytes` is 232449, but a block has at most 232448",
            ),
            (format!("{}{ENTRY}", TABLE.replace("min_blocks", "blocks")), "unknown field `blocks`"),
            (format!("{}{ENTRY}", TABLE.replace(":\\22a\\22", ":\\22b\\22")), "names the entry `b`"),
        ] {
            let message = finish(&ir).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}\n  does not say\n{expected}");
        }
    }
}
