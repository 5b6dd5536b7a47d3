//! What the lanes of a warp do together: shuffles, votes, matches, reductions and elections.

use super::{Decode, Decoder, Mods, Ty};
use crate::isa::*;
use crate::parse::{Class, Operand, Statement};

impl Decoder<'_> {
    pub(super) fn shuffle(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") {
            return Err("`shfl` without `.sync` is unknown".into());
        }
        let mode = m.find(|part| {
            Some(match part {
                "up" => ShuffleMode::Up,
                "down" => ShuffleMode::Down,
                "bfly" => ShuffleMode::Butterfly,
                "idx" => ShuffleMode::Index,
                _ => return None,
            })
        });
        let mode = mode.ok_or("the shuffle has no mode")?;
        m.ty()?;
        let (d, p) = self.pair(s, 0)?;
        let d = match d {
            Operand::Sink => self.temp(Class::R32),
            d => self.reg(&d, Class::R32)?.index,
        };
        let p = match p {
            Some(Operand::Sink) | None => None,
            Some(p) => Some(self.reg(&p, Class::Pred)?.index),
        };
        let (a, b, c, mask) = (self.u32_at(s, 1)?, self.u32_at(s, 2)?, self.u32_at(s, 3)?, self.u32_at(s, 4)?);
        self.push(Op::Shuffle(Box::new(Shuffle { mode, d, p, a, b, c, mask })));
        Ok(())
    }

    pub(super) fn vote(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") {
            return Err("`vote` without `.sync` is unknown".into());
        }
        let mode = m.find(|part| {
            Some(match part {
                "all" => VoteMode::All,
                "any" => VoteMode::Any,
                "uni" => VoteMode::Uniform,
                "ballot" => VoteMode::Ballot,
                _ => return None,
            })
        });
        let mode = mode.ok_or("the vote has no mode")?;
        m.ty()?;
        let d = self.dst(s, 0, if mode == VoteMode::Ballot { Class::R32 } else { Class::Pred })?;
        let a = self.operand(s, 1)?.clone();
        let (p, negated) = self.predicate(&a)?;
        let mask = self.u32_at(s, 2)?;
        self.push(Op::Vote(Box::new(Vote { mode, d, p, negated, mask })));
        Ok(())
    }

    pub(super) fn match_sync(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        let all = m.take("all");
        if !m.take("sync") || (!all && !m.take("any")) {
            return Err("only match.{any,all}.sync is known".into());
        }
        let wide = m.ty()?.bits() == 64;
        let (d, p) = self.pair(s, 0)?;
        let d = self.reg(&d, Class::R32)?.index;
        let p = match p {
            Some(Operand::Sink) | None => None,
            Some(p) => Some(self.reg(&p, Class::Pred)?.index),
        };
        let a = if wide { self.a64(s, 1, Ty::B(64))? } else { self.u32_at(s, 1)? };
        let mask = self.u32_at(s, 2)?;
        self.push(Op::Match(Box::new(Match { all, wide, d, p, a, mask })));
        Ok(())
    }

    pub(super) fn redux(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") {
            return Err("`redux` without `.sync` is unknown".into());
        }
        let name = m.first();
        let op = match (name, m.ty()?.signed()) {
            ("add", _) => ReduxOp::Add,
            ("min", false) => ReduxOp::MinU,
            ("min", true) => ReduxOp::MinS,
            ("max", false) => ReduxOp::MaxU,
            ("max", true) => ReduxOp::MaxS,
            ("and", _) => ReduxOp::And,
            ("or", _) => ReduxOp::Or,
            ("xor", _) => ReduxOp::Xor,
            _ => return Err(format!("unknown modifier `.{name}`")),
        };
        let (d, a, mask) = (self.d32(s)?, self.u32_at(s, 1)?, self.u32_at(s, 2)?);
        self.push(Op::Redux(op, d, a, mask));
        Ok(())
    }

    pub(super) fn elect(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") {
            return Err("`elect` without `.sync` is unknown".into());
        }
        let (d, p) = self.pair(s, 0)?;
        let d = match d {
            Operand::Sink => None,
            d => Some(self.reg(&d, Class::R32)?.index),
        };
        let p = self.reg(&p.ok_or("the predicate is missing")?, Class::Pred)?.index;
        let mask = self.u32_at(s, 1)?;
        self.push(Op::Elect { d, p, mask });
        Ok(())
    }
}
