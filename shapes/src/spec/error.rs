//! What is wrong with a spec, for people. All problems come at once, each with its place and its
//! mend.

use core::fmt;
use core::ops::Range;

use crate::text::{MESSAGE_BYTES, plain};

/// A longer line is not shown.
const LINE_BYTES: usize = 200;

/// Everything that is wrong with one spec, or with a set of them.
///
/// `Display` prints all of it over several lines, up to [`MESSAGE_BYTES`].
#[derive(Clone, PartialEq, Eq)]
pub struct SpecError {
    /// The problems, at least one, in the order of the file.
    pub problems: Vec<Problem>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, by the name that its reader was given.
    pub file: String,
    /// Line, counted from 1. It is 0 when the problem has no place in the text, as in a file that
    /// cannot be read.
    pub line: u32,
    /// Column in characters, counted from 1. It is 0 when the problem has no place.
    pub column: u32,
    /// Dotted path of the key or table, as in `video.frames`. It is empty for what concerns the
    /// whole file.
    pub key: String,
    /// What was found. It completes "`key` ...", or stands alone without a key.
    pub found: String,
    /// What may stand there.
    pub allowed: String,
    /// How to mend it.
    pub mend: String,
    /// The text of the line, and the characters of it that are meant. A blank or very long line has
    /// none.
    excerpt: Option<(String, Range<usize>)>,
}

impl std::error::Error for SpecError {}

impl fmt::Debug for SpecError {
    /// As `Display`, because a `main` that returns an error shows it so.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut text = String::new();
        for (i, problem) in self.problems.iter().enumerate() {
            let (line, problem) = (if i > 0 { "\n" } else { "" }, problem.to_string());
            // There must be room to say how many are left.
            if text.len() + problem.len() + 40 > MESSAGE_BYTES && i > 0 {
                text += &format!("\nand {} more problems\n", self.problems.len() - i);
                break;
            }
            text += line;
            text += &problem;
        }
        f.write_str(&text)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.key.is_empty() {
            writeln!(f, "error: {}", self.found)?;
        } else {
            writeln!(f, "error: `{}` {}", self.key, self.found)?;
        }
        let number = if self.line == 0 { String::new() } else { self.line.to_string() };
        let margin = " ".repeat(number.len());
        match self.line {
            0 => writeln!(f, "{margin}--> {}", self.file)?,
            line => writeln!(f, "{margin}--> {}:{line}:{}", self.file, self.column)?,
        }
        if let Some((text, meant)) = &self.excerpt {
            let (before, marks) = (" ".repeat(meant.start), "^".repeat(meant.len().max(1)));
            writeln!(f, "{margin} |\n{number} | {text}\n{margin} | {before}{marks}")?;
        }
        writeln!(f, "{margin} = allowed: {}", self.allowed)?;
        writeln!(f, "{margin} = mend: {}", self.mend)
    }
}

/// A file's name and text, to give problems their place.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub file: &'a str,
    pub text: &'a str,
}

impl Source<'_> {
    /// A problem at a byte range of the text, or one of the whole file.
    pub fn problem(
        &self,
        span: Option<Range<usize>>,
        key: &str,
        found: impl Into<String>,
        allowed: impl Into<String>,
        mend: impl Into<String>,
    ) -> Problem {
        let part = |text: &str, most| plain(text, most).into_owned();
        let mut problem = Problem {
            file: part(self.file, 300),
            line: 0,
            column: 0,
            key: part(key, 200),
            found: part(&found.into(), 400),
            allowed: part(&allowed.into(), 400),
            mend: part(&mend.into(), 200),
            excerpt: None,
        };
        let Some(span) = span else { return problem };
        let start = floor_char_boundary(self.text, span.start);
        let before = &self.text[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = self.text[line_start..].lines().next().unwrap_or("");
        let column = before[line_start..].chars().count();
        let end = floor_char_boundary(self.text, span.end).clamp(start, (line_start + line.len()).max(start));
        let meant = column..column + self.text[start..end].chars().count();
        problem.line = before.matches('\n').count() as u32 + 1;
        problem.column = column as u32 + 1;
        if !line.trim().is_empty() && line.len() <= LINE_BYTES {
            // Tabs have no certain width on a terminal. One space keeps the marks under what they
            // mean.
            problem.excerpt = Some((line.replace(char::is_control, " "), meant));
        }
        problem
    }
}

/// The last character boundary at or before byte `at`.
fn floor_char_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}
