// plan.h - the compiled plan: one forward pass as a flat list of operators, and the team that runs it.
//
// Everything is sized when the plan is built: a step allocates nothing, takes no lock but its turn on the team, and
// calls no Python. The batch is an argument; the plan keeps no sequence state (that lives in the KV pool and the
// caller's tables).
#ifndef PACE_PLAN_H
#define PACE_PLAN_H

#include <stdbool.h>

#include "choices.h"
#include "lists.h"
#include "operators.h"
#include "threads.h"
#include "work.h"

#define PACE_MAX_LISTS 16  // kinds of rope and attention work in one plan; a model has one to five

typedef struct {
    pace_team *team;
    int n_threads;
    pace_op *ops;
    long n_ops, cap_ops;
    long max_tokens, max_seqs, max_logits;  // logits that exist at a time; a step may ask for more, see pace_plan_head
    long first_op, end_op, head_row;        // what a run runs; the first logit row of the head's
    pace_batch batch;
    pace_list lists[PACE_MAX_LISTS];  // this step's work
    int n_lists;
    float *parts;  // split attention's partial results: [tile][kv head][piece][rows][2 + head_dim]
    pace_work fold;
    pace_sorted *sorted;  // [n_threads], of the running experts' operator
    pace_work ring[2];
    size_t scratch_bytes;  // a worker's, which the team keeps
    double *op_s;          // seconds of every operator in the last step, as worker 0 saw it
    long *op_experts;      // and the experts that its rows chose; 0 where it has none
} pace_plan;

int pace_plan_init(pace_plan *p, pace_team *team, long max_tokens, long max_seqs, long max_logits);  // 0, or ENOMEM
void pace_plan_free(pace_plan *p);
// A copy of a checked operator goes behind the others. 0, ENOMEM, E2BIG: more kinds of work than PACE_MAX_LISTS, or a
// code of pace_team_reserve; the plan is as it was then.
int pace_plan_add(pace_plan *p, const pace_op *op);
// The batch must have been checked by the caller (ranges, monotone q_start, table entries). 0 or an error of
// pace_team_run.
int pace_plan_step(pace_plan *p, const pace_batch *batch);
// Operators first .. end - 1 of it alone, so that somebody can look at slots in between.
int pace_plan_part(pace_plan *p, const pace_batch *batch, long first, long end);
// The logits of the last step's rows from `first` on, at most max_logits of them: scoring a prompt of 2000 tokens must
// not take a gigabyte. The step itself has made the first ones.
int pace_plan_head(pace_plan *p, long first);

#endif
