//! Gathers what is wrong.

use alloc::borrow::ToOwned as _;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::string::ToString as _;
use alloc::vec::Vec;

use abi::Malformed;
use abi::Problem;

use crate::Options;
use crate::model::Finding;
use crate::model::Severity;
use crate::rules;

/// Findings of one rule that are listed: who has more of a kind is not served by the hundredth.
const EACH: u64 = 20;
/// Things that could not be read that are listed.
const UNREAD: usize = 200;

pub(crate) struct Findings {
    options: Options,
    pub(crate) list: Vec<Finding>,
    pub(crate) left_out: u64,
    pub(crate) unread: Vec<String>,
    by_rule: BTreeMap<&'static str, u64>,
    /// Something that refers to memory may not have been met.
    pub(crate) lost: bool,
}

impl Findings {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            options,
            list: Vec::new(),
            left_out: 0,
            unread: Vec::new(),
            by_rule: BTreeMap::new(),
            lost: false,
        }
    }

    /// What a decoder found.
    pub(crate) fn fault(&mut self, subject: &str, fault: &Malformed) {
        if let (true, Problem::Unreadable(none)) = (self.options.partial, &fault.problem) {
            self.unread(format!("{subject}: {:#x} is out of reach of this source", none.address));
            return;
        }
        let rule = rules::broken_by(fault);
        self.add(rule, subject, Some(fault.address), Some(fault.field), &fault.to_string());
    }

    /// That a rule is broken.
    pub(crate) fn add(
        &mut self,
        rule: &'static str,
        subject: &str,
        address: Option<u64>,
        field: Option<&'static str>,
        words: &str,
    ) {
        let severity = rules::rule(rule).map_or(Severity::Error, |rule| rule.severity);
        self.add_as(severity, rule, subject, address, field, words);
    }

    /// That a rule is broken, and that it is this bad.
    pub(crate) fn add_as(
        &mut self,
        severity: Severity,
        rule: &'static str,
        subject: &str,
        address: Option<u64>,
        field: Option<&'static str>,
        words: &str,
    ) {
        self.lost |= severity == Severity::Error;
        let count = self.by_rule.entry(rule).or_default();
        *count += 1;
        if *count > EACH {
            self.left_out += 1;
            return;
        }
        let stale = self.options.running && severity == Severity::Error;
        let severity = if stale { Severity::Warning } else { severity };
        let words = if stale { format!("{words}; it may be stale") } else { words.to_owned() };
        self.list.push(Finding { rule, severity, subject: subject.to_owned(), address, field, words });
    }

    /// That something could not be read, though nothing is wrong with it.
    pub(crate) fn unread(&mut self, what: String) {
        self.lost = true;
        if self.unread.len() < UNREAD && !self.unread.contains(&what) {
            self.unread.push(what);
        }
    }
}
