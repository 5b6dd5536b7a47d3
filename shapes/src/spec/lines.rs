//! Writes the text of a spec from its keys and values. A spec made in code and one that a macro was
//! given become text here, so that one parser reads all.

use core::fmt::Write;

/// Tables and lines of a spec in TOML. Each line keeps its origin, to which an error can be traced.
pub struct Lines<T> {
    /// Dotted paths of the tables, and their lines.
    tables: Vec<(String, Vec<(String, T)>)>,
}

impl<T: Clone> Lines<T> {
    /// No tables.
    pub const fn new() -> Lines<T> {
        Lines { tables: Vec::new() }
    }

    /// Adds a table, unless it is there. The top of the file is `""`.
    pub fn table(&mut self, table: &str) -> &mut Vec<(String, T)> {
        let index = self.tables.iter().position(|(path, _)| path == table).unwrap_or_else(|| {
            self.tables.push((table.into(), Vec::new()));
            self.tables.len() - 1
        });
        &mut self.tables[index].1
    }

    /// Adds a line to a table. `value` is TOML.
    pub fn push(&mut self, table: &str, key: &str, value: &str, origin: T) {
        self.table(table).push((format!("{key} = {value}"), origin));
    }

    /// The text, and the origin of each of its lines. The header of a table has the origin of its
    /// first line. Without a line that is `whole`.
    pub fn text(mut self, whole: T) -> (String, Vec<T>) {
        // Top-level keys must come before any table.
        self.tables.sort_by_key(|(table, _)| !table.is_empty());
        let (mut text, mut origins) = (String::new(), Vec::new());
        for (table, lines) in self.tables {
            if !table.is_empty() {
                let _ = writeln!(text, "[{table}]");
                origins.push(lines.first().map_or(&whole, |(_, origin)| origin).clone());
            }
            for (line, origin) in lines {
                let _ = writeln!(text, "{line}");
                origins.push(origin);
            }
        }
        (text, origins)
    }
}
