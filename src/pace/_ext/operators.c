#include "operators.h"

// A field's type here must be its type there.
#define C_TYPE(type, c_type) typedef c_type c_##type;
PACE_FIELD_TYPES(C_TYPE)
#define CHECK(op, type, name) \
    _Static_assert(_Generic(&((pace_##op *)0)->name, c_##type * : 1, default : 0), #op "." #name " is no " #type);
#define CHECK_ALL(op, cut) PACE_FIELDS_##op(CHECK)
PACE_OPERATORS(CHECK_ALL)

#define FIELD(op, type, name) {#name, PACE_OP_##op, PACE_FIELD_##type, offsetof(pace_##op, name)},
#define FIELDS(op, cut) PACE_FIELDS_##op(FIELD)
const pace_field pace_fields[] = {PACE_OPERATORS(FIELDS){NULL, 0, 0, 0}};

#define TEXT(name) #name,
#define NAME(op, cut) #op,
const char *const pace_op_names[] = {PACE_OPERATORS(NAME)};

const char *const *pace_choices(int type) {
    static const char *const acts[] = {PACE_ACTS(TEXT) NULL}, *const epilogues[] = {PACE_EPILOGUES(TEXT) NULL};
    static const char *const norms[] = {PACE_NORMS(TEXT) NULL}, *const scopes[] = {PACE_SCOPES(TEXT) NULL};
    static const char *const orders[] = {PACE_ORDERS(TEXT) NULL};
    switch (type) {
        case PACE_FIELD_act:
            return acts;
        case PACE_FIELD_epilogue:
            return epilogues;
        case PACE_FIELD_norm_kind:
            return norms;
        case PACE_FIELD_scope:
            return scopes;
        case PACE_FIELD_order:
            return orders;
        default:
            return NULL;
    }
}
