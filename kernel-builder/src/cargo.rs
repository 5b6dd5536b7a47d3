//! The nested cargo. Of the user's cargo configuration it obeys only where crates come from.
//!
//! Cargo reads `.cargo/config.toml` in the current directory, in each folder above it, and in
//! CARGO_HOME. Such a file may change how crates are compiled, and with that the PTX. It may hold
//! `[build]`, `[profile]` for single packages, `[env]`, `[target]`, `[patch]`, `paths`, and
//! `[unstable]`, which a release compiler obeys under `RUSTC_BOOTSTRAP`. Options on the command
//! line win only over equal keys. So the builder keeps cargo from the files themselves:
//!
//! * Cargo runs in the root of the file system, which nothing lies above. A configuration of the
//!   root itself is refused if it holds more than the [`KEPT`] tables.
//! * Its CARGO_HOME is a folder without a configuration. Registry, sources, credentials and locks
//!   in it are links to those of the user.
//! * The [`KEPT`] tables of the user's files are merged as cargo merges them, and given by
//!   `--config`. So a mirror, vendored sources and a proxy work as in any other build.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use toml::{Table, Value};

use crate::BuildError;
use crate::error::at;
use crate::files::{create, link, write_if_new};
use crate::toolchain::{self, Toolchain};

/// Tables that say where crates come from. None of them changes what is compiled, because
/// Cargo.lock has the digests of crates.
const KEPT: [&str; 6] = ["source", "registries", "registry", "net", "http", "credential-alias"];

/// What CARGO_HOME holds for all builds of a user: crates and their sources, credentials, and the
/// files that cargo locks.
const SHARED: [&str; 7] =
    ["registry", "git", "credentials.toml", "credentials", ".package-cache", ".package-cache-mutate", ".global-cache"];

/// A cargo that uses the device compiler, and obeys of the user's settings only where crates come
/// from. `folder` keeps its CARGO_HOME, `work` the settings of this build.
pub(crate) fn command(toolchain: &Toolchain, folder: &Path, work: &Path) -> Result<Command, BuildError> {
    let current = env::current_dir().map_err(at("read", Path::new(".")))?;
    let home = user_home().map(|home| current.join(home));
    let root = folder.ancestors().last().unwrap_or(folder);
    if let Some(file) = configuration_above(root) {
        let others = read(&file)?.into_iter().map(|(name, _)| name).filter(|name| !KEPT.contains(&name.as_str()));
        let others: Vec<String> = others.collect();
        if !others.is_empty() {
            return Err(BuildError::RootConfiguration { file, tables: others.join(", ") });
        }
    }

    let mut settings = Table::new();
    let above = current.ancestors().flat_map(configuration_above);
    for file in above.chain(home.iter().flat_map(|home| configuration_in(home))) {
        let mut table = read(&file)?;
        table.retain(|name, _| KEPT.contains(&name));
        make_absolute(&mut table, file.parent().and_then(Path::parent).unwrap_or(root));
        merge(&mut settings, table);
    }
    let configuration = work.join("cargo.toml");
    write_if_new(&configuration, settings.to_string().as_bytes())?;

    let own_home = folder.join("cargo-home");
    create(&own_home)?;
    if let Some(home) = home {
        for name in SHARED {
            let shared = home.join(name);
            if matches!(name, "registry" | "git") {
                create(&shared)?;
            }
            link(&shared, &own_home.join(name))?;
        }
    }

    let mut cargo = Command::new(&toolchain.cargo);
    toolchain::sanitise(&mut cargo, toolchain);
    cargo.current_dir(root).env("CARGO_HOME", own_home).arg("--config").arg(configuration);
    Ok(cargo)
}

/// CARGO_HOME, or the folder that cargo takes when the variable is not set.
fn user_home() -> Option<PathBuf> {
    let named = env::var_os("CARGO_HOME").filter(|value| !value.is_empty()).map(PathBuf::from);
    named.or_else(|| env::home_dir().map(|home| home.join(".cargo")))
}

/// The configuration that cargo reads when it runs in this folder or below it.
fn configuration_above(folder: &Path) -> Option<PathBuf> {
    configuration_in(&folder.join(".cargo"))
}

/// The configuration in this folder. `config`, the old name, wins over `config.toml`.
fn configuration_in(folder: &Path) -> Option<PathBuf> {
    ["config", "config.toml"].into_iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

fn read(file: &Path) -> Result<Table, BuildError> {
    let text = fs::read_to_string(file).map_err(at("read", file))?;
    text.parse().map_err(|error: toml::de::Error| at("read", file)(io::Error::other(error.message().to_string())))
}

/// Makes paths absolute. In a configuration they count from the folder that its `.cargo` lies in.
fn make_absolute(settings: &mut Table, base: &Path) {
    let absolute = |value: &mut Value| {
        if let Value::String(path) = value {
            *path = base.join(&*path).display().to_string();
        }
    };
    if let Some(Value::Table(sources)) = settings.get_mut("source") {
        for source in sources.iter_mut().filter_map(|(_, source)| source.as_table_mut()) {
            source.get_mut("directory").into_iter().for_each(absolute);
            source.get_mut("local-registry").into_iter().for_each(absolute);
        }
    }
    if let Some(Value::Table(http)) = settings.get_mut("http") {
        http.get_mut("cainfo").into_iter().for_each(absolute);
    }
}

/// Adds the keys that are not there yet. So a file nearer to the current directory wins, key by
/// key.
fn merge(settings: &mut Table, others: Table) {
    for (name, value) in others {
        match (settings.get_mut(&name), value) {
            (Some(Value::Table(known)), Value::Table(more)) => merge(known, more),
            (Some(_), _) => {}
            (None, value) => {
                settings.insert(name, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearer_settings_win_key_by_key_and_paths_count_from_their_file() {
        let table = |text: &str| text.parse::<Table>().unwrap();
        let mut settings =
            table("[source.crates-io]\nreplace-with = \"vendored\"\n[source.vendored]\ndirectory = \"vendor\"");
        make_absolute(&mut settings, Path::new("/project"));
        let mut above = table(
            "net.offline = true\n[source.crates-io]\nreplace-with = \"mirror\"\n[source.mirror]\nlocal-registry = \"/m\"",
        );
        make_absolute(&mut above, Path::new("/"));
        merge(&mut settings, above);
        let expected = "net.offline = true\n[source.crates-io]\nreplace-with = \"vendored\"\n[source.vendored]\ndirectory = \"/project/vendor\"\n[source.mirror]\nlocal-registry = \"/m\"";
        assert_eq!(settings, table(expected));
    }
}
