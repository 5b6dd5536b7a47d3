//! Where a command's results go. A place is checked before anything is computed, and written in one
//! piece.
//!
//! A regular file is written beside its place and then moved there. So nobody sees half of it, and
//! what stood there stays until the new file is whole. Links are followed. A pipe or a device, such
//! as `/dev/stdout`, is written through and stays what it is.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use framestride::{Error, Result};
use framestride_pictures::Picture;

/// A place that can be written, as far as that can be known before.
pub struct Output {
    path: PathBuf,
    target: Target,
}

enum Target {
    /// Standard output, by whichever name it was given.
    Stdout,
    /// A pipe or a device.
    Stream,
    /// The file behind all links, and the permissions of the file that stands there.
    File(PathBuf, Option<Permissions>),
}

impl Output {
    /// Checks a path. It must be no folder, no read-only file and none of `inputs`, and its folder
    /// must be writable.
    pub fn new(path: &Path, inputs: &[&Path]) -> Result<Output> {
        let refuse = |found: String, allowed: &str, mend: &str| Error::input(path.display(), found, allowed, mend);
        let target = match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                return Err(refuse("a folder".into(), "a file to write", "Add the name of a file"));
            }
            Ok(found) if is_same(&found, stdout_metadata().as_ref()) => Target::Stdout,
            Ok(found) if !found.is_file() => Target::Stream,
            Ok(found) => {
                if inputs.iter().any(|input| is_same(&found, fs::metadata(input).ok().as_ref())) {
                    return Err(refuse(
                        "a file that this run reads".into(),
                        "another file than the inputs",
                        "Give the output a name of its own",
                    ));
                }
                if found.permissions().readonly() {
                    return Err(refuse(
                        "a read-only file".into(),
                        "a file that may be written, or none",
                        "Allow writing it (chmod u+w), or give another name",
                    ));
                }
                let target = OpenOptions::new().write(true).open(path).and_then(|_| fs::canonicalize(path));
                Target::File(target.map_err(|error| Error::file(path, error))?, Some(found.permissions()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let target = follow(path).map_err(|error| Error::file(path, error))?;
                if target.file_name().is_none() {
                    return Err(refuse("no name of a file".into(), "a file to write", "Add the name of a file"));
                }
                Target::File(target, None)
            }
            Err(error) => return Err(Error::file(path, error)),
        };
        if let Target::File(file, _) = &target {
            let folder = folder_of(file);
            // The only sure way to know is to make a file.
            tempfile::tempfile_in(folder).map_err(|error| {
                refuse(
                    format!("folder {}, in which no file can be made ({error})", folder.display()),
                    "a folder that exists and may be written",
                    "Make the folder first, or give another one",
                )
            })?;
        }
        Ok(Output { path: path.to_owned(), target })
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is standard output. Then nothing else may be printed there.
    pub fn is_stdout(&self) -> bool {
        matches!(self.target, Target::Stdout)
    }

    /// Whether both go to one file, or to standard output.
    pub fn is_same(&self, other: &Output) -> bool {
        match (&self.target, &other.target) {
            (Target::File(own, _), Target::File(others, _)) => {
                // A file that does not exist yet has no identity, but its folder has.
                let location =
                    |file: &Path| (fs::canonicalize(folder_of(file)).ok(), file.file_name().map(ToOwned::to_owned));
                location(own) == location(others)
            }
            (Target::Stdout, Target::Stdout) => true,
            _ => false,
        }
    }

    /// Writes all of the output.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        let written = match &self.target {
            Target::Stdout => write_stdout(bytes),
            Target::Stream => {
                OpenOptions::new().write(true).open(&self.path).and_then(|mut file| file.write_all(bytes))
            }
            Target::File(file, permissions) => replace(file, permissions.as_ref(), bytes),
        };
        written.map_err(|error| Error::file(&self.path, error))
    }

    /// Writes a picture as a PNG file.
    pub fn write_picture(&self, picture: &Picture) -> Result<()> {
        self.write(&picture.png().map_err(|error| Error::file(&self.path, io::Error::other(error)))?)
    }
}

/// Makes a folder for outputs, where it is not there yet.
pub fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| {
        let found = match fs::metadata(folder) {
            Ok(_) => "a file".into(),
            Err(_) => format!("a folder that cannot be made ({error})"),
        };
        Error::input(folder.display(), found, "a folder, or a place where one can be made", "Give another folder")
    })
}

/// Prints text on standard output.
pub fn print(text: &str) -> Result<()> {
    write_stdout(text.as_bytes()).map_err(|error| Error::file("standard output", error))
}

/// Writes all bytes to standard output at once.
fn write_stdout(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    unless_closed(stdout.write_all(bytes).and_then(|()| stdout.flush()))
}

/// Forgives that the reader of a pipe has gone away, since it has what it wanted.
pub fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    written.or_else(|error| if error.kind() == ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
}

/// Puts a new file in the place of another one, with its permissions.
fn replace(file: &Path, permissions: Option<&Permissions>, bytes: &[u8]) -> io::Result<()> {
    let mut builder = tempfile::Builder::new();
    // The file is readable as any new file is. The process' umask keeps it secret if it should be.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut new = builder.tempfile_in(folder_of(file))?;
    new.write_all(bytes)?;
    if let Some(permissions) = permissions {
        new.as_file().set_permissions(permissions.clone())?;
    }
    new.persist(file)?;
    Ok(())
}

fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The path behind all links, where no file stands yet.
fn follow(path: &Path) -> io::Result<PathBuf> {
    /// Linux follows as many links.
    const LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::read_link(&path) {
            Ok(next) => path = folder_of(&path).join(next),
            // The path is no link, or nothing stands there.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("a loop of links"))
}

/// Whether two files are the same file under two names.
fn is_same(file: &Metadata, other: Option<&Metadata>) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        other.is_some_and(|other| (file.dev(), file.ino()) == (other.dev(), other.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = (file, other);
        false
    }
}

/// The file or pipe that standard output is. A terminal or another device is none, since it takes
/// text and files alike.
fn stdout_metadata() -> Option<Metadata> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let stdout = std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned().ok()?;
        File::from(stdout).metadata().ok().filter(|stdout| !stdout.file_type().is_char_device())
    }
    #[cfg(not(unix))]
    None
}
