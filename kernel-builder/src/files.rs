//! Files and folders of the build cache. Each is there whole or not at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::BuildError;
use crate::error::at;

/// Creates a folder and those above it.
pub(crate) fn create(folder: &Path) -> Result<(), BuildError> {
    fs::create_dir_all(folder).map_err(at("create", folder))
}

/// Makes `path` a symbolic link to `target`, whatever it was before.
pub(crate) fn link(target: &Path, path: &Path) -> Result<(), BuildError> {
    if fs::read_link(path).is_ok_and(|found| found == target) {
        return Ok(());
    }
    // Another process may do the same, so the link is made under another name and renamed.
    let beside = beside(path);
    let linked = make_link(target, &beside).and_then(|()| fs::rename(&beside, path));
    linked.inspect_err(|_| _ = fs::remove_file(&beside)).map_err(at("create", path))
}

#[cfg(unix)]
fn make_link(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn make_link(target: &Path, path: &Path) -> io::Result<()> {
    if target.is_dir() {
        std::os::windows::fs::symlink_dir(target, path)
    } else {
        std::os::windows::fs::symlink_file(target, path)
    }
}

/// Writes a file unless it already holds these bytes, because cargo goes by the time of the last
/// change.
pub(crate) fn write_if_new(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    if fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    write_atomically(path, bytes)
}

/// Writes a file under another name and renames it. A reader sees the old bytes or the new ones,
/// and if the disk is full, the old ones stay.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let beside = beside(path);
    let written = fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path));
    written.inspect_err(|_| _ = fs::remove_file(&beside)).map_err(at("write", path))
}

/// A name in the same folder that no other process and no other thread uses.
fn beside(path: &Path) -> PathBuf {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.{}.new", std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed)));
    path.with_file_name(name)
}
