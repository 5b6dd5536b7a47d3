//! Who uses which part of the build cache, and which parts go when it has grown too large.
//!
//! A build holds two locks: that of its key, which builds share, and that of its crate, which it
//! has alone. A lock lies beside the part that it is for and is never removed. Its time of change
//! says when that part was last used. A compiled `core` counts as a key.
//!
//! When the cache is larger than [`MOST_BYTES`], the parts that were used least lately are removed:
//! crates one by one, and whole keys. A part that is in use stays.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::BuildError;
use crate::error::at;
use crate::files::create;

/// The most bytes that builds take between runs. A spec takes 8 MB, and what all specs of a key
/// share takes 150 MB.
const MOST_BYTES: u64 = 4 << 30;

/// Name of the folder, in the folder of a key, that holds the key's crates.
pub(crate) const CRATES: &str = "crates";

/// Holds a part of the cache until the returned file is dropped. Waits while another holds it
/// `alone`.
pub(crate) fn hold(part: &Path, alone: bool) -> Result<File, BuildError> {
    let path = lock_of(part);
    path.parent().map_or(Ok(()), create)?;
    let file = File::options().create(true).append(true).open(&path).map_err(at("create", &path))?;
    let locked = if alone { file.lock() } else { file.lock_shared() };
    locked.and_then(|()| file.set_modified(SystemTime::now())).map_err(at("lock", &path))?;
    Ok(file)
}

fn lock_of(part: &Path) -> PathBuf {
    part.with_extension("lock")
}

/// Removes the parts that were used least lately. A part that cannot be removed stays, because no
/// build should fail for it.
pub(crate) fn prune(cache: &Path) {
    prune_to(&cache.join("builds"), MOST_BYTES);
}

fn prune_to(builds: &Path, most: u64) {
    let mut bytes = size(builds);
    let mut parts: Vec<(SystemTime, PathBuf)> = Vec::new();
    for key in entries(builds).into_iter().filter(|path| path.is_dir()) {
        // A crate consists of `name`, `name.work` and `name.lock`. It sorts before its key, which
        // is used whenever one of its crates is.
        let crates =
            entries(&key.join(CRATES)).into_iter().filter(|path| path.extension().is_some_and(|end| end == "work"));
        for part in crates.map(|work| work.with_extension("")).chain([key.clone()]) {
            let used = fs::metadata(lock_of(&part)).and_then(|data| data.modified());
            parts.push((used.unwrap_or(SystemTime::UNIX_EPOCH), part));
        }
    }
    parts.sort_by_key(|(used, _)| *used);
    for (_, part) in parts {
        if bytes <= most {
            return;
        }
        let Ok(lock) = File::options().create(true).append(true).open(lock_of(&part)) else { continue };
        if lock.try_lock().is_ok() {
            for folder in [part.with_extension("work"), part] {
                let freed = size(&folder);
                if fs::remove_dir_all(&folder).is_ok() {
                    bytes = bytes.saturating_sub(freed);
                }
            }
        }
    }
}

/// Bytes of the files below a folder. Links are not followed.
fn size(folder: &Path) -> u64 {
    let bytes = |path: PathBuf| match fs::symlink_metadata(&path) {
        Ok(data) if data.is_dir() => size(&path),
        Ok(data) => data.len(),
        Err(_) => 0,
    };
    entries(folder).into_iter().map(bytes).sum()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map_or_else(|_| Vec::new(), |entries| entries.flatten().map(|entry| entry.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A crate of 1000 bytes in a key, last used on day `day`.
    fn part(builds: &Path, key: &str, name: &str, day: u64) -> PathBuf {
        let part = builds.join(key).join(CRATES).join(name);
        fs::create_dir_all(part.with_extension("work")).unwrap();
        fs::create_dir_all(&part).unwrap();
        fs::write(part.with_extension("work").join("device.ll"), [0; 900]).unwrap();
        fs::write(part.join("spec.toml"), [0; 100]).unwrap();
        for used in [part.clone(), builds.join(key)] {
            let lock = File::options().create(true).append(true).open(lock_of(&used)).unwrap();
            lock.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(86400 * day)).unwrap();
        }
        part
    }

    #[test]
    fn what_was_used_least_lately_goes_first_and_what_is_in_use_stays() {
        let folder = tempfile::tempdir().unwrap();
        let builds = folder.path();
        let [a, b, c] =
            [("old", "a", 1), ("old", "b", 2), ("new", "c", 4)].map(|(key, name, day)| part(builds, key, name, day));
        let target = builds.join("old/target");
        fs::create_dir_all(&target).unwrap();
        fs::write(target.join("core.rlib"), [0; 5000]).unwrap();
        let there = || [&a, &b, &c, &target].map(|path| path.exists());

        prune_to(builds, 8000);
        assert_eq!(there(), [true; 4]);
        prune_to(builds, 7500);
        assert_eq!(there(), [false, true, true, true]);
        // Builds share the key, and have the crate alone.
        let (key, alone) = (hold(&builds.join("old"), false).unwrap(), hold(&b, true).unwrap());
        for held in [builds.join("old"), b.clone()] {
            // Holding it has set its time of change, but the test has an order of its own.
            File::options().append(true).open(lock_of(&held)).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        prune_to(builds, 6500);
        assert_eq!(there(), [false, true, false, true]);
        assert!(!c.with_extension("work").exists() && lock_of(&c).exists());
        drop(alone);
        prune_to(builds, 5500);
        assert_eq!(there(), [false, false, false, true]);
        drop(key);
        prune_to(builds, 100);
        assert_eq!(there(), [false; 4]);
        assert!(!builds.join("old").exists());
    }
}
