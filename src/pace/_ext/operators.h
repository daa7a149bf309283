// operators.h - the operators of a plan as data: which fields a struct of kernels.h has, so that one piece of code
// fills all of them.
#ifndef PACE_OPERATORS_H
#define PACE_OPERATORS_H

#include "kernels.h"

#define PACE_OP_KIND(op, cut) PACE_OP_##op,
enum pace_op_kind { PACE_OPERATORS(PACE_OP_KIND) PACE_N_OP_KINDS };

// Types of fields and the C type of each; the last five are choices by name.
typedef float pace_triple[3];
#define PACE_FIELD_TYPES(X)     \
    X(slot, pace_slot)          \
    X(matrix, pace_matrix)      \
    X(vector, const float *)    \
    X(columns, const int32_t *) \
    X(real, float)              \
    X(integer, long)            \
    X(flag, int)                \
    X(triple, pace_triple)      \
    X(kv, pace_kv)              \
    X(rotation, pace_rotation)  \
    X(act, int)                 \
    X(epilogue, int)            \
    X(norm_kind, int)           \
    X(scope, int)               \
    X(order, int)
#define PACE_FIELD_TYPE(type, c_type) PACE_FIELD_##type,
enum pace_field_type { PACE_FIELD_TYPES(PACE_FIELD_TYPE) };

typedef struct {
    const char *name;
    int op;         // enum pace_op_kind
    int type;       // enum pace_field_type
    size_t offset;  // in the operator's struct
} pace_field;

extern const pace_field pace_fields[];     // of all operators, one after the other; ends with name NULL
extern const char *const pace_op_names[];  // [PACE_N_OP_KINDS]
// The names of a choice, ended by NULL; the index is the value. NULL: the type is no choice.
const char *const *pace_choices(int type);

typedef struct {
    int kind;          // enum pace_op_kind
    int logits;        // runs over the logit rows
    int head;          // the last one, which makes logits: at most max_logits rows at a time
    int list;          // rope and attention: the work list
    float *block_max;  // the LM head's: [m][blocks of PACE_LOGIT_BLOCK columns] maxima of dst (f32), or NULL
    const pace_kernels *kernels;
#define PACE_OP_MEMBER(op, cut) pace_##op op;
    union {
        PACE_OPERATORS(PACE_OP_MEMBER)
    } u;
} pace_op;

#endif
