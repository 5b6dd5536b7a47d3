//! Reads the text of a spec's file, and typed values of known keys from its TOML tree.
//!
//! The tree remembers where everything stands in the text. What is wrong is collected.

use core::ops::Range;
use std::io::Read;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::error::{Problem, Source, SpecError};
use super::keys::{Key, Kind, NAME_LENGTH, Presence, TABLES, Table};
use crate::text::nearest;

type Span = Range<usize>;

/// A spec has at most so many bytes.
const MOST_BYTES: u64 = 1 << 20;

/// The text of a spec's file. The file is read once, so that it may be a pipe.
pub(crate) fn read_file(path: &Path) -> Result<String, SpecError> {
    let file = path.display().to_string();
    let fail = |found: String, allowed: &str, mend: &str| SpecError {
        problems: vec![Source { file: &file, text: "" }.problem(None, "", found, allowed, mend)],
    };
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes)).map_err(|error| {
        fail(format!("the spec cannot be read: {error}"), "a TOML file", "check the path and its permissions")
    })?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(fail(
            format!("more than {MOST_BYTES} bytes"),
            "a TOML file of some lines",
            "give the spec's own file",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let byte = error.as_bytes()[valid];
        let text = String::from_utf8_lossy(error.as_bytes());
        // Up to `valid`, the text with replacements equals the text itself.
        let problem = Source { file: &file, text: &text }.problem(
            Some(valid..valid + 1),
            "",
            format!("not UTF-8: byte 0x{byte:02x}"),
            "UTF-8 text",
            "save the file as UTF-8",
        );
        SpecError { problems: vec![problem] }
    })
}

/// A parsed file, and the problems found so far.
pub(crate) struct Reader<'a> {
    pub source: Source<'a>,
    root: Spanned<DeTable<'a>>,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    /// Parses the text, and reports every table and key that does not belong there.
    ///
    /// It fails when the text is not TOML, since problems of a broken tree would only mislead.
    pub fn new(source: Source<'a>) -> Result<Reader<'a>, Vec<Problem>> {
        let (root, errors) = DeTable::parse_recoverable(source.text);
        if !errors.is_empty() {
            let problem = |error: &toml::de::Error| {
                source.problem(
                    error.span(),
                    "",
                    format!("not TOML: {}", error.message()),
                    "TOML: `[table]` lines, `key = value` lines, and each key once (https://toml.io)",
                    "correct this line",
                )
            };
            return Err(errors.iter().map(problem).collect());
        }
        let mut reader = Reader { source, root, problems: Vec::new() };
        let mut problems = Vec::new();
        for top in TABLES.iter().filter(|table| table.parent().is_none()) {
            reader.check_table(top, reader.root.get_ref(), &mut problems);
        }
        reader.problems = problems;
        Ok(reader)
    }

    /// Ends the reading. Gives `value`, or what was wrong, in the order of the file.
    pub fn finish<T>(mut self, value: Option<T>) -> Result<T, Vec<Problem>> {
        let missing = self.missing_tables();
        self.problems.extend(missing);
        self.problems.sort_by_key(|problem| (problem.line, problem.column));
        match value {
            Some(value) if self.problems.is_empty() => Ok(value),
            _ => Err(self.problems),
        }
    }

    /// Reports what is wrong with a key. The problem has the place of the key's value.
    pub fn report(&mut self, key: &Key, found: impl Into<String>, allowed: impl Into<String>, mend: impl Into<String>) {
        let span = self.span(key);
        self.problems.push(self.source.problem(Some(span), key.path, found, allowed, mend));
    }

    /// Whether a table is written.
    pub fn has_table(&self, path: &str) -> bool {
        self.table(path).is_some()
    }

    /// Whether a key is written, whatever its value is.
    pub fn has(&self, key: &Key) -> bool {
        self.table(key.table()).is_some_and(|(table, _)| table.contains_key(key.name()))
    }

    /// Where a key's value stands. Without a value it is the place of its table, or the top of the
    /// file.
    pub fn span(&self, key: &Key) -> Span {
        match self.table(key.table()) {
            Some((table, span)) => table.get(key.name()).map_or(span, |value| value.span()),
            None => 0..0,
        }
    }

    /// Reads an integer.
    pub fn integer(&mut self, key: &Key) -> Option<u64> {
        self.read(key, |value| {
            let integer = integer(value)?;
            match key.kind {
                Kind::Integer(least, most) => (least..=most).contains(&integer),
                Kind::IntegerOf(values) => values.contains(&integer),
                _ => false,
            }
            .then_some(integer)
        })
    }

    /// Reads an integer of a key whose range fits `u32`.
    pub fn integer32(&mut self, key: &Key) -> Option<u32> {
        self.integer(key).and_then(|value| u32::try_from(value).ok())
    }

    /// Reads two integers.
    pub fn pair(&mut self, key: &Key) -> Option<[u32; 2]> {
        self.read(key, |value| {
            let Kind::Pair(least, most) = key.kind else { return None };
            let extent = |value: &Spanned<DeValue>| {
                integer(value.get_ref())
                    .filter(|value| (least..=most).contains(value))
                    .and_then(|v| u32::try_from(v).ok())
            };
            match value.as_array()?.iter().map(extent).collect::<Option<Vec<u32>>>()?[..] {
                [height, width] => Some([height, width]),
                _ => None,
            }
        })
    }

    /// Reads an integer or a float.
    pub fn number(&mut self, key: &Key) -> Option<f64> {
        self.read(key, |value| {
            let number = match value {
                DeValue::Integer(_) => integer(value)? as f64,
                _ => value.as_float()?.as_str().parse().ok()?,
            };
            let Kind::Number(least, most) = key.kind else { return None };
            // Zero itself is never allowed. Any other bound is.
            (number <= most && number >= least && number > 0.0).then_some(number)
        })
    }

    /// Reads true or false.
    pub fn boolean(&mut self, key: &Key) -> Option<bool> {
        self.read(key, |value| value.as_bool())
    }

    /// Reads a name.
    pub fn name(&mut self, key: &Key) -> Option<String> {
        self.read(key, |value| {
            let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            let name = value.as_str()?;
            ((1..=NAME_LENGTH).contains(&name.len()) && name.chars().all(known)).then(|| name.into())
        })
    }

    /// Reads one of `values`. `name` gives the name of each, as it stands in the key's list.
    pub fn choice<T: Copy>(&mut self, key: &Key, values: &[T], name: fn(T) -> &'static str) -> Option<T> {
        self.read(key, |value| {
            let found = value.as_str()?;
            values.iter().copied().find(|&value| name(value) == found)
        })
    }

    /// Reads a key with `parse`, or takes its default. What `parse` refuses is reported.
    fn read<T>(&mut self, key: &Key, parse: impl Fn(&DeValue) -> Option<T>) -> Option<T> {
        let Some((table, span)) = self.table(key.table()) else {
            // A missing table is reported as a whole. An optional table has the defaults of its
            // keys.
            return match key.presence {
                Presence::Default(text) => default(text, parse),
                Presence::Required | Presence::Optional | Presence::OneOfTable => None,
            };
        };
        if let Some(value) = table.get(key.name()) {
            let read = parse(value.get_ref());
            if read.is_none() {
                let found = format!("is {}", describe(value.get_ref()));
                let problem =
                    self.source.problem(Some(value.span()), key.path, found, key.kind.allowed(), meaning(key));
                self.problems.push(problem);
            }
            return read;
        }
        match key.presence {
            Presence::Default(text) => default(text, parse),
            Presence::Optional | Presence::OneOfTable => None,
            Presence::Required if self.is_misspelt(key.table(), key.name()) => None,
            Presence::Required => {
                let place =
                    if key.table().is_empty() { "the top of the file".into() } else { format!("[{}]", key.table()) };
                let mend = format!("add `{} = {}` to {place}: {}", key.name(), key.example, key.doc);
                let problem = self.source.problem(Some(span), key.path, "is missing", key.kind.allowed(), mend);
                self.problems.push(problem);
                None
            }
        }
    }

    /// A table, and where it stands.
    fn table(&self, path: &str) -> Option<(&DeTable<'a>, Span)> {
        // The root's own span is the whole file, so its problems belong to the first line.
        let mut found = (self.root.get_ref(), 0..0);
        for name in path.split('.').filter(|name| !name.is_empty()) {
            let value = found.0.get(name)?;
            found = (value.get_ref().as_table()?, value.span());
        }
        Some(found)
    }

    /// Reports what stands in a table and belongs to no key and no table of the spec.
    fn check_table(&self, known: &Table, tree: &DeTable, problems: &mut Vec<Problem>) {
        for (name, value) in tree {
            if known.keys().any(|key| key.name() == name.get_ref()) {
                continue;
            }
            let path = match known.path {
                "" => name.get_ref().to_string(),
                table => format!("{table}.{}", name.get_ref()),
            };
            let Some(table) = known.tables().find(|table| table.name() == name.get_ref()) else {
                problems.push(self.unknown(known, name, value.get_ref(), &path));
                continue;
            };
            match value.get_ref().as_table() {
                Some(tree) => self.check_table(table, tree, problems),
                None => problems.push(self.source.problem(
                    Some(value.span()),
                    &path,
                    format!("is {}", describe(value.get_ref())),
                    format!("a table: {}", table.doc),
                    format!("write `[{path}]` on a line of its own and its keys below it"),
                )),
            }
        }
    }

    /// The problem of a name that the spec does not have. It tells the nearest name that the spec
    /// has.
    fn unknown(&self, table: &Table, name: &Spanned<DeString>, value: &DeValue, path: &str) -> Problem {
        let known: Vec<&str> = table.names().collect();
        let mend = match nearest(name.get_ref(), table.names()) {
            Some(nearest) => format!("did you mean `{nearest}`?"),
            None => "remove it".into(),
        };
        let place = if table.path.is_empty() { "at the top".into() } else { format!("in [{}]", table.path) };
        self.source.problem(
            Some(name.span()),
            path,
            if value.is_table() { "is not a table of the spec" } else { "is not a key of the spec" },
            format!("{place}: {}", known.join(", ")),
            mend,
        )
    }

    /// Whether a table has a name that seems to mean this one. Then the name is reported, and that
    /// this one is missing need not be.
    pub fn is_misspelt(&self, table: &str, name: &str) -> bool {
        let known = TABLES.iter().find(|known| known.path == table);
        let Some((known, (tree, _))) = known.zip(self.table(table)) else { return false };
        tree.keys().any(|found| nearest(found.get_ref(), known.names()) == Some(name))
    }

    /// Reports required tables that are not there. A table without keys of its own is only the
    /// parent of others.
    fn missing_tables(&self) -> Vec<Problem> {
        let required = TABLES.iter().filter(|table| table.required && table.keys().next().is_some());
        let misspelt = |table: &Table| table.parent().is_some_and(|parent| self.is_misspelt(parent, table.name()));
        let missing = required.filter(|table| !self.written(table) && !misspelt(table)).map(|table| {
            let line = |key: &Key| format!("`{} = {}`", key.name(), key.example);
            let one_of = table.keys().filter(|key| matches!(key.presence, Presence::OneOfTable)).take(1);
            let required = table.keys().filter(|key| matches!(key.presence, Presence::Required));
            let needed: Vec<String> = required.chain(one_of).map(line).collect();
            self.source.problem(
                Some(0..0),
                table.path,
                "is missing",
                format!("a table: {}", table.doc),
                format!("add `[{}]` with {}", table.path, needed.join(" and ")),
            )
        });
        missing.collect()
    }

    /// Whether something stands at a table's path, or in place of a table above it. The latter is
    /// reported on its own.
    fn written(&self, table: &Table) -> bool {
        let mut tree = self.root.get_ref();
        for name in table.path.split('.').filter(|name| !name.is_empty()) {
            match tree.get(name).map(|value| value.get_ref()) {
                None => return false,
                Some(DeValue::Table(table)) => tree = table,
                Some(_) => return true,
            }
        }
        true
    }
}

/// What a key means, as the mend of a wrong value.
fn meaning(key: &Key) -> String {
    format!("write for example `{} = {}`: {}", key.name(), key.example, key.doc)
}

/// Parses a default of the key list with the same code as a written value.
fn default<T>(text: &'static str, parse: impl Fn(&DeValue) -> Option<T>) -> Option<T> {
    DeValue::parse(text).ok().and_then(|value| parse(value.get_ref()))
}

/// Reads a non-negative integer of up to 64 bits.
fn integer(value: &DeValue) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// A value in words, for "is ...".
fn describe(value: &DeValue) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(integer) => match integer.radix() {
            16 => format!("0x{}", integer.as_str()),
            8 => format!("0o{}", integer.as_str()),
            2 => format!("0b{}", integer.as_str()),
            _ => integer.as_str().into(),
        },
        DeValue::Float(float) => float.as_str().into(),
        DeValue::Boolean(boolean) => boolean.to_string(),
        DeValue::Datetime(datetime) => format!("the date {datetime}"),
        DeValue::Array(array) => {
            let inner: Vec<String> = array.iter().take(4).map(|value| describe(value.get_ref())).collect();
            let more = if array.len() > inner.len() { ", ..." } else { "" };
            format!("[{}{more}]", inner.join(", "))
        }
        DeValue::Table(_) => "a table".into(),
    }
}
