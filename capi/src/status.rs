//! What every function returns, and the message behind it.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use framestride::Error;

/// What a function returns. Later versions may have more values.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum framestride_status {
    /// All went well.
    FRAMESTRIDE_OK = 0,
    /// An argument is not what it must be. Nothing was launched.
    FRAMESTRIDE_INVALID_ARGUMENT = 1,
    /// A handle was freed, is of another kind, or was never given.
    FRAMESTRIDE_INVALID_HANDLE = 2,
    /// A spec is wrong. The message lists every problem.
    FRAMESTRIDE_INVALID_SPEC = 3,
    /// A file cannot be read, or does not hold kernels of this version.
    FRAMESTRIDE_INVALID_FILE = 4,
    /// The GPU or its driver does not run the kernels, or this version cannot do what was asked for.
    FRAMESTRIDE_UNSUPPORTED = 5,
    /// There is no driver, or no GPU of this number.
    FRAMESTRIDE_NO_GPU = 6,
    /// A call of the CUDA driver failed. The message has its name and its code.
    FRAMESTRIDE_DRIVER = 7,
    /// The emulator stopped a kernel.
    FRAMESTRIDE_EMULATOR = 8,
    /// The library made a mistake, which is worth a report.
    FRAMESTRIDE_INTERNAL = 9,
}

use framestride_status::*;

/// A call that failed: its status, and its message.
pub(crate) struct Failure {
    pub status: framestride_status,
    pub message: String,
}

pub(crate) type Result<T = (), E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure with the message of an error, whatever the error's own status is.
    pub fn new(status: framestride_status, error: impl ToString) -> Failure {
        Failure { status, message: error.to_string() }
    }

    /// An argument that is not what it must be.
    pub fn argument(subject: &str, found: impl ToString, allowed: impl ToString, mend: &str) -> Failure {
        Error::input(subject, found.to_string(), allowed.to_string(), mend).into()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match error {
            Error::Spec(_) => FRAMESTRIDE_INVALID_SPEC,
            Error::Manifest(_) | Error::File { .. } => FRAMESTRIDE_INVALID_FILE,
            Error::NoGpu(_) => FRAMESTRIDE_NO_GPU,
            Error::Driver { .. } => FRAMESTRIDE_DRIVER,
            Error::Emulator(_) => FRAMESTRIDE_EMULATOR,
            _ => FRAMESTRIDE_INVALID_ARGUMENT,
        };
        Failure::new(status, error)
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function. Neither an error nor a panic leaves it, but a status and a message.
pub(crate) fn guard(body: impl FnOnce() -> Result) -> framestride_status {
    // Whatever a panic leaves half done belongs to the call that ends here: the table of handles is
    // changed in single steps.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return FRAMESTRIDE_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(FRAMESTRIDE_INTERNAL, format!("a mistake of the library: {}", payload(&*panic))),
    };
    // The message of an error has no zero bytes, since control characters are escaped. While a thread
    // ends there is no place for it.
    let message = CString::new(failure.message).unwrap_or_default();
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    failure.status
}

/// What a panic said.
fn payload(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}

/// The message of this thread's last call that failed: what was found, what is allowed, and how to
/// mend it. UTF-8 of several lines, and empty where no call has failed.
///
/// The text is the library's, and stays valid until this thread's next call fails or it ends.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// The version of the library, such as "0.1.0". The text is the library's.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The version of this interface that the header describes. It grows with every addition.
pub const FRAMESTRIDE_ABI_VERSION: u32 = 3;

/// The version of the interface that the library has. Programs that were compiled with a header of
/// this version or of an earlier one work with it.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_abi_version() -> u32 {
    FRAMESTRIDE_ABI_VERSION
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last_error() -> String {
        // SAFETY: the text is this thread's, and nothing replaces it here.
        unsafe { CStr::from_ptr(framestride_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_stays_inside() {
        assert_eq!(last_error(), "");
        assert_eq!(guard(|| panic!("{} went wrong", "something")), FRAMESTRIDE_INTERNAL);
        assert_eq!(last_error(), "a mistake of the library: something went wrong");
        assert_eq!(guard(|| panic!("at once")), FRAMESTRIDE_INTERNAL);
        assert_eq!(last_error(), "a mistake of the library: at once");
        assert_eq!(guard(|| Ok(())), FRAMESTRIDE_OK);
        assert_eq!(last_error(), "a mistake of the library: at once", "a call that succeeds leaves the message");
        let invalid = Failure::new(FRAMESTRIDE_UNSUPPORTED, "no");
        assert_eq!((guard(|| Err(invalid)), last_error().as_str()), (FRAMESTRIDE_UNSUPPORTED, "no"));
    }
}
