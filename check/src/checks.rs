//! Outcomes of comparisons. A list of them is never empty, so that none passes without a
//! comparison.

use serde::Serialize;

use crate::reference::{distance, norm};
use crate::tolerance;

/// The outcome of comparing one quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The kernel that made the result.
    pub kernel: &'static str,
    /// Head types, valid text, arrangement of inputs and output; or the way in which the layer was
    /// launched.
    pub case: String,
    /// What of the result was compared.
    pub quantity: &'static str,
    /// How many rows, heads, counts or runs were compared.
    pub compared: u64,
    /// How many there are.
    pub of: u64,
    /// What these two numbers count: "rows", "heads", "counts" or "runs".
    pub unit: &'static str,
    /// Relative error of the worst row: the row whose error is the largest part of its tolerance.
    /// It is null in JSON when it is not a number. Where bytes or elements are counted, it is their
    /// number.
    pub rel_error: f64,
    /// Tolerance of the worst row.
    pub tolerance: f64,
    /// Whether something was compared, and every row is within its tolerance, which is below
    /// [`tolerance::BLIND`].
    pub ok: bool,
    /// Where the worst row is, and why it is not comparable, if it is not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub worst: String,
}

/// Checks, of which there is at least one.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
#[must_use]
pub struct Checks {
    /// Never empty: every constructor takes a first check.
    checks: Vec<Check>,
}

impl Checks {
    /// A first check, and others.
    pub fn new(first: Check, others: impl IntoIterator<Item = Check>) -> Checks {
        Checks { checks: std::iter::once(first).chain(others).collect() }
    }

    /// Adds one check.
    pub fn push(&mut self, check: Check) {
        self.checks.push(check);
    }

    /// Whether every check passed.
    #[must_use]
    pub fn all_passed(&self) -> bool {
        self.failed().next().is_none()
    }

    /// The checks that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.ok)
    }

    /// All checks, of which there is at least one.
    #[must_use]
    pub fn as_slice(&self) -> &[Check] {
        &self.checks
    }
}

impl Extend<Check> for Checks {
    fn extend<T: IntoIterator<Item = Check>>(&mut self, checks: T) {
        self.checks.extend(checks);
    }
}

impl IntoIterator for Checks {
    type Item = Check;
    type IntoIter = std::vec::IntoIter<Check>;

    fn into_iter(self) -> Self::IntoIter {
        self.checks.into_iter()
    }
}

/// The worst row, or run, so far.
pub(crate) struct Worst {
    pub compared: u64,
    rel_error: f64,
    tolerance: f64,
    location: String,
}

impl Worst {
    /// Nothing is compared yet.
    pub fn new() -> Worst {
        Worst { compared: 0, rel_error: 0.0, tolerance: 0.0, location: String::new() }
    }

    /// Compares one row.
    pub fn add(&mut self, rel_error: f64, tolerance: f64, location: impl FnOnce() -> String) {
        self.compared += 1;
        self.keep_worse(rel_error, tolerance, location);
    }

    /// Keeps a row if it is the worst. It does not count as compared.
    pub fn keep_worse(&mut self, rel_error: f64, tolerance: f64, location: impl FnOnce() -> String) {
        // NaN counts as the worst error, and nothing replaces it. Incomparable rows come second.
        let part = |error: f64, tolerance: f64| match error {
            _ if tolerance >= tolerance::BLIND && !error.is_nan() => f64::INFINITY,
            0.0 => 0.0,
            _ => error / tolerance,
        };
        let (new, old) = (part(rel_error, tolerance), part(self.rel_error, self.tolerance));
        if !old.is_nan() && (self.location.is_empty() || new.is_nan() || new > old) {
            *self = Worst { rel_error, tolerance, location: location(), ..*self };
        }
    }

    /// The worst of both, and how many both compared.
    pub fn merge(mut self, other: Worst) -> Worst {
        self.compared += other.compared;
        if !other.location.is_empty() {
            self.keep_worse(other.rel_error, other.tolerance, || other.location);
        }
        self
    }

    /// The check of one quantity, of which there are `of`.
    pub fn check(
        self,
        kernel: &'static str,
        case: &str,
        quantity: &'static str,
        (of, unit): (u64, &'static str),
    ) -> Check {
        let Worst { compared, rel_error, tolerance, location } = self;
        // With this comparison, NaN is not comparable either.
        let comparable = tolerance < tolerance::BLIND;
        let worst =
            if comparable { location } else { format!("{location}: not comparable, zeros are within the tolerance") };
        Check {
            kernel,
            case: case.to_owned(),
            quantity,
            compared,
            of,
            unit,
            rel_error,
            tolerance,
            ok: compared > 0 && comparable && rel_error <= tolerance,
            worst,
        }
    }
}

/// Relative error of a row.
pub(crate) fn row_error(found: &[f64], reference: &[f64]) -> f64 {
    let (error, size) = (distance(found, reference), norm(reference));
    if error == 0.0 { 0.0 } else { error / size }
}
